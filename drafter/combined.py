"""Several drafters over the same texts: whose turn it is, the strategy says."""

from collections.abc import Mapping, Sequence
from typing import Any

from drafter.selfdraft import ApproximatePolicy, DraftsAsPolicy
from drafter.types import Begun, Drafts, FollowsTemperature, ResidentDrafter, Rows, Strategy, Texts


class CombinedDrafter:
    """A ResidentDrafter of several, by the strategies' source. All hear of every sequence; one proposes in a cycle."""

    def __init__(self, drafters: Mapping[str, ResidentDrafter]) -> None:
        assert "off" not in drafters
        self._drafters = dict(drafters)

    def attach(self, texts: Texts) -> None:
        """Draft from these texts from now on; all of them are free."""
        for drafter in self._drafters.values():
            drafter.attach(texts)

    def begin(self, begun: Sequence[Begun], free_texts: Sequence[int]) -> list[list[int]]:
        """Sequences start to write texts; each drafter may take free texts that those before it left."""
        taken: list[list[int]] = [[] for _ in begun]
        for drafter in self._drafters.values():
            for texts, more in zip(taken, drafter.begin(begun, free_texts[sum(map(len, taken)) :]), strict=True):
                texts += more
        return taken

    def refresh(self, strategy: Strategy, *, grown: int) -> None:
        """Let the strategy's source make ready to propose."""
        self._drafters[strategy.source].refresh(strategy, grown=grown)

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        """Let the strategy's source write a draft for each of the first B rows."""
        self._drafters[strategy.source].propose(texts, rows, strategy, out)

    def lend(self, policy: ApproximatePolicy | None) -> None:
        """Lend the policy to those that draft with it, or take it back."""
        for drafter in self._drafters.values():
            if isinstance(drafter, DraftsAsPolicy):
                drafter.lend(policy)

    def set_temperature(self, temperature: float) -> None:
        """Draft for sampling at this temperature from now on."""
        for drafter in self._drafters.values():
            if isinstance(drafter, FollowsTemperature):
                drafter.set_temperature(temperature)

    def finish(self, text: int, prompt_id: str, token_ids: Sequence[int]) -> None:
        """The sequence that wrote this text is complete."""
        for drafter in self._drafters.values():
            drafter.finish(text, prompt_id, token_ids)

    def release(self, texts: Sequence[int]) -> None:
        """These texts are free again; some of them only one drafter has ever heard of."""
        for drafter in self._drafters.values():
            drafter.release(texts)

    def state_dict(self) -> dict[str, Any]:
        """The drafters' states, by source."""
        return {source: drafter.state_dict() for source, drafter in self._drafters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was saved of the sources there are, or by a suffix drafter that drafted alone."""
        state = {"suffix": state} if "finished" in state else state
        for source, drafter in self._drafters.items():
            if source in state:
                drafter.load_state_dict(state[source])
