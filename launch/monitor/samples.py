"""A step's rollouts from samples/step_N.parquet: a page of them, and one in full with its accepted drafts marked."""

import re
from glob import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

HASH = re.compile("-[0-9a-f]{12}")
PREVIEW = 160  # characters of a response in the list
LONGEST_PAGE = 200
ORDERS = {"prompt": None, "reward": "ascending", "best": "descending", "long": "descending"}
_ORDERED_BY = {"reward": "reward", "best": "reward", "long": "num_tokens"}
_LISTED = ("prompt_id", "sample", "question", "answer", "reward", "advantage", "num_tokens", "finish", "forwards")


def sample_page(path: Path, *, offset: int, limit: int, order: str) -> dict[str, Any]:
    """Rollouts offset to offset + limit in an order of ORDERS: figures, and how the response begins.

    row is a rollout's place in the file, which sample takes.
    """
    table = pq.read_table(path, columns=[*_LISTED, "text"])
    rows = list(range(table.num_rows))
    if (direction := ORDERS[order]) is not None:
        rows = pc.sort_indices(table, sort_keys=[(_ORDERED_BY[order], direction)]).to_pylist()
    shown = rows[offset : offset + min(limit, LONGEST_PAGE)]
    records = table.take(pa.array(shown, pa.int64())).to_pylist()
    for row, record in zip(shown, records, strict=True):
        record["row"] = row
        record["text"] = record["text"][:PREVIEW]
    return {"total": table.num_rows, "offset": offset, "rows": records}


def sample(path: Path, row: int, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """A rollout in full, None past the last. pieces: [text, was drafted] in order; [] where that is not known.

    Without token ids or a tokenizer the text is whole, and "plain" says why it has no colours.
    """
    table = pq.read_table(path)
    if not 0 <= row < table.num_rows:
        return None
    record: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
    for scores in ("logprobs", "dense_logprobs"):  # as long as the text, and nothing to read
        record.pop(scores, None)
    token_ids, drafted = record.pop("token_ids", None), record.pop("drafted", None)
    record |= {"row": row, "pieces": [], "plain": ""}
    if token_ids is None or drafted is None:
        record["plain"] = "this run kept no token ids, so accepted drafts cannot be shown"
    elif tokenizer is None:
        record["plain"] = "the model's tokenizer is not on this machine, so accepted drafts cannot be shown"
    else:
        record["pieces"] = pieces(token_ids, drafted, tokenizer)
    return record


def pieces(token_ids: list[int], drafted: list[bool], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The response as text, cut where accepted drafts begin and end.

    A character of several tokens belongs with the last of them.
    """
    stream = DecodeStream(skip_special_tokens=True)
    found: list[tuple[str, bool]] = []
    for token, is_draft in zip(token_ids, drafted, strict=True):
        text = stream.step(tokenizer, token)
        if not text:
            continue
        if found and found[-1][1] == is_draft:
            found[-1] = (found[-1][0] + text, is_draft)
        else:
            found.append((text, is_draft))
    return found


def find_tokenizer(model: str) -> Tokenizer | None:
    """The tokenizer of a model that is on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    from rollout.pretrained import SHIPPED, cache_root

    if not model:
        return None
    # a shipped model or one of a .gguf file, as rollout.pretrained converted it: its name, and a hash
    converted = (cache_root() / "models").glob(f"{escape(Path(model).stem)}-*")
    named = [path for path in converted if HASH.fullmatch(path.name[len(Path(model).stem) :])]
    for folder in [Path(model).expanduser(), *named]:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
    shipped = SHIPPED.get(model.lower())
    hub_id = shipped.hub_id if shipped else model
    if hub_id.count("/") == 1 and not Path(model).is_absolute():
        cached = try_to_load_from_cache(hub_id, "tokenizer.json")
        if isinstance(cached, str):
            return Tokenizer.from_file(cached)
    return None
