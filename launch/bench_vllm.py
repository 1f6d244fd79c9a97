"""vLLM as the peer of `paceline bench`: generates what it is told, line by line, and says how long that took.

A script of its own, run by a Python that has vLLM: it imports nothing of Paceline. Standard input holds one JSON
object a line: first how to make the engine (model, load_format, max_len, max_num_seqs, memory, kv_bytes), then orders
(batch, prompt_len, new_tokens, seed). Each is answered by one JSON line on standard output; whatever vLLM prints goes
to standard error.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from importlib import metadata
from time import perf_counter
from typing import Any, TextIO

SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles at start with nvcc, and samples without log-probs either way
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: no message queue between the clock and the engine
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
FIRST_TOKENS, LAST_TOKENS = 10, 300  # ids at both ends of a vocabulary that tend to be special


def main() -> None:
    """Serve orders until standard input ends."""
    answers = _private_stdout()
    os.environ.update(SETTINGS)
    orders = (json.loads(line) for line in sys.stdin)
    for answer in serve(orders):
        print(json.dumps(answer), file=answers, flush=True)


def serve(orders: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Make the engine, then carry out one order after another.

    Yields versions, import_s, ready_s (making the engine, weights included) and first_token_s (one token of a 64-token
    prompt after that); then {"seconds": ...} for each order.
    """
    job = next(orders)
    begun = perf_counter()
    import torch
    from vllm import LLM, SamplingParams

    imported = perf_counter()
    engine = LLM(
        model=job["model"],
        load_format=job["load_format"],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=job["max_len"],
        max_num_seqs=job["max_num_seqs"],
        gpu_memory_utilization=job["memory"],
        kv_cache_memory_bytes=job["kv_bytes"],
        enable_prefix_caching=False,  # every prompt is new: looking for it would be wasted
        disable_log_stats=True,
    )
    ready = perf_counter()
    vocab_size = engine.llm_engine.model_config.get_vocab_size()

    def generate(batch: int, prompt_len: int, new_tokens: int, seed: int) -> float:
        choices = random.Random(seed)
        vocabulary = range(min(FIRST_TOKENS, vocab_size - 1), max(vocab_size - LAST_TOKENS, FIRST_TOKENS + 1))
        prompts = [{"prompt_token_ids": choices.choices(vocabulary, k=prompt_len)} for _ in range(batch)]
        how = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = perf_counter()
        outputs = engine.generate(prompts, how, use_tqdm=False)
        seconds = perf_counter() - start
        if any(len(output.outputs[0].token_ids) != new_tokens for output in outputs):
            raise SystemExit(f"vLLM did not sample {new_tokens} tokens for each of {batch} prompts")
        return seconds

    yield {
        "versions": {name: metadata.version(name) for name in ("vllm", "torch", "transformers")},
        "import_s": imported - begun,
        "ready_s": ready - imported,
        "first_token_s": generate(1, 64, 1, 0),
        "settings": {name: value for name, value in job.items() if name != "model"} | SETTINGS,
    }
    for order in orders:
        yield {"seconds": generate(**order)}


def _private_stdout() -> TextIO:
    """Standard output for answers alone: what libraries write to it goes to standard error from here on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


if __name__ == "__main__":
    main()
