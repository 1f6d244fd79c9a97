"""`paceline samples`: rollouts of a step for a person to read, accepted drafts in colour."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text

from configs.errors import PreflightError
from launch.monitor.samples import find_tokenizer, sample, sample_page

Order = Literal["prompt", "worst", "best", "longest"]
_PAGE_ORDER = {"prompt": "prompt", "worst": "reward", "best": "best", "longest": "long"}
DRAFTED = "bold cyan"
QUESTION_CHARS = 400


def samples_file(run: Path, step: int | None) -> Path:
    """The samples of a step, or of the last one. Raises PreflightError where there are none."""
    files = {int(path.stem.removeprefix("step_")): path for path in (run / "samples").glob("step_*.parquet")}
    if not files:
        raise PreflightError(f"{run} has no samples yet; they are written at the end of every step")
    step = max(files) if step is None else step
    if step not in files:
        raise PreflightError(f"{run} has no samples of step {step}; it has {min(files)} to {max(files)}")
    return files[step]


def show_samples(run: Path, console: Console, *, step: int | None, order: Order, count: int, model: str) -> None:
    """Print so many rollouts of a step. model: whose tokenizer tells where in the text a token ends."""
    path = samples_file(run, step)
    tokenizer = find_tokenizer(model)
    rows = sample_page(path, offset=0, limit=count, order=_PAGE_ORDER[order])["rows"]
    records = [record for row in rows if (record := sample(path, row["row"], tokenizer)) is not None]
    for record in records:
        console.print(shown(record, step=int(path.stem.removeprefix("step_"))))
    if console.is_terminal and any(record["pieces"] for record in records):
        console.print(Text.assemble(("Accepted drafts", DRAFTED), " stand in this colour."))
    if notes := {record["plain"] for record in records} - {""}:
        console.print(Text("; ".join(sorted(notes)), style="dim"))


def shown(record: dict[str, Any], *, step: int) -> Group:
    """One rollout: what was asked, what was said, and how it was judged."""
    title = (
        f"step {step}  {record['prompt_id']}/{record['sample']}  reward {record['reward']:.3g}"
        f" (advantage {record['advantage']:+.2f})  {record['num_tokens']} tokens, {record['finish']}"
        f"  accept length {record['num_tokens'] / max(record['forwards'], 1):.2f}"
    )
    under = record.get("sampled_under", "dense")  # which older runs do not say
    title += "" if under == "dense" else f"  attention {under}"
    question = record["question"]
    if len(question) > QUESTION_CHARS:
        question = question[:QUESTION_CHARS] + " …"
    return Group(
        Text(visible(title), style="bold"),
        Padding(Text(visible(question), style="dim"), (0, 0, 0, 2)),
        answer(record["pieces"] or [(record["text"], False)]),
        Padding(Text.assemble(("wanted ", "dim"), visible(record["answer"])), (0, 0, 1, 2)),
    )


def answer(pieces: Sequence[tuple[str, bool]]) -> Text:
    """The response, accepted drafts in colour."""
    text = Text()
    for piece, drafted in pieces:
        text.append(visible(piece), style=DRAFTED if drafted else "")
    return text


def visible(text: str) -> str:
    """The text without what would move the cursor or change the terminal: a model may write anything."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
