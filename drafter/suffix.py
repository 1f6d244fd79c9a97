"""Drafts from what was already said: siblings of the prompt, its earlier epochs, and the sequence itself."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from drafter.history import RolloutHistory, saved_rollouts
from drafter.tree import Match, grow
from drafter.types import EMPTY, Draft, DraftState, Strategy

# Matches that may vote on one draft: more change few drafts and cost time.
MAX_MATCHES = 16
# Places looked at for one n-gram, newest first.
MAX_WALK = 32
END = -1  # of a chain of places


class TextIndex:
    """Where n-grams occur in the texts of one prompt: hash chains as in LZ77, one a size, newest place first.

    A place is a position in a text together with all before it; it is numbered in the order of arrival. Sizes double
    from min_match, so that the longest matches are found first, also where a short n-gram occurs often.
    Texts grow at their ends only. Memory: at most 600 bytes a token, held by a test.
    """

    def __init__(self, *, min_match: int, max_match: int) -> None:
        sizes = [min_match]
        while sizes[-1] * 2 <= max_match:
            sizes.append(sizes[-1] * 2)
        self.texts: list[list[int]] = []
        self._max_match = max_match
        self._owner = array("i")  # [places]: number of the text
        self._after = array("i")  # [places]: index of the token that follows
        # by size, largest first: the newest place of an n-gram (by its hash), and each place's next older one
        self._chains = [(size, dict[int, int](), array("i")) for size in reversed(sizes)]

    def open(self, token_ids: Iterable[int]) -> int:
        """Add a text whose tokens are known from elsewhere and propose nothing; returns its number."""
        self.texts.append(list(token_ids))
        return len(self.texts) - 1

    def extend(self, number: int, token_ids: Iterable[int]) -> None:
        """Append to a text."""
        text = self.texts[number]
        for token in token_ids:
            text.append(token)
            self.mark(number, len(text))

    def mark(self, number: int, after: int) -> None:
        """Let the text's first tokens, up to after, be a place that matches."""
        text = self.texts[number]
        place = len(self._after)
        self._owner.append(number)
        self._after.append(after)
        for size, newest, older in self._chains:
            if size > after:
                older.append(END)
                continue
            key = hash(tuple(text[after - size : after]))  # of integers: the same in every process
            older.append(newest.get(key, END))
            newest[key] = place

    def matches(self, token_ids: Sequence[int]) -> list[Match]:
        """Places that end as token_ids does and have a successor: longest agreement first, then newest."""
        context = list(token_ids[-self._max_match :])
        found: list[Match] = []
        seen: set[int] = set()
        for size, newest, older in self._chains:
            if size > len(context):
                continue
            tail = context[-size:]
            place = newest.get(hash(tuple(tail)), END)
            walked = 0
            while place != END and walked < MAX_WALK:
                text, after = self.texts[self._owner[place]], self._after[place]
                # the slice tells a true match from a collision of hashes
                if after < len(text) and place not in seen and text[after - size : after] == tail:
                    seen.add(place)
                    found.append((text, after, _agreement(text, after, context, size)))
                place = older[place]
                walked += 1
            if len(found) >= MAX_MATCHES:
                break
        found.sort(key=lambda match: -match[2])
        return found[:MAX_MATCHES]


def _agreement(text: list[int], after: int, context: list[int], known: int) -> int:
    """How many tokens before `after` equal the context's last ones, at least `known`."""
    length = known
    longest = min(after, len(context))
    while length < longest and text[after - 1 - length] == context[-1 - length]:
        length += 1
    return length


class _Flight:
    """A prompt with sequences in flight: the index of its texts, and which text each of them writes."""

    def __init__(self, prompt_ids: list[int], index: TextIndex) -> None:
        self.prompt_ids = prompt_ids
        self.index = index
        self.running: dict[int, int] = {}  # sample -> number of its text
        # the last token's successor is each sequence's own
        prompt = index.open(prompt_ids)
        for after in range(1, len(prompt_ids)):
            index.mark(prompt, after)

    def start(self, response_ids: Iterable[int]) -> int:
        """Add a text: the prompt, and what followed it; returns its number."""
        number = self.index.open(self.prompt_ids)
        self.index.mark(number, len(self.prompt_ids))
        self.index.extend(number, response_ids)
        return number

    def response(self, sample: int) -> list[int]:
        """What a sequence in flight has said so far."""
        return self.index.texts[self.running[sample]][len(self.prompt_ids) :]


class SuffixDrafter:
    """Looks the sequence's last tokens up in its prompt's texts, and drafts what followed them there.

    Sources: the prompt and the sequence itself (prompt look-up), its siblings in flight and finished, and rollouts of
    the same prompt from earlier epochs. After SuffixDecoding (Oliaro et al., arXiv 2411.04975), with hash chains for
    its suffix trees. The same calls give the same drafts in every process.

    min_match: shortest agreement that may propose. max_match: longest that is told apart, at least min_match.
    max_history and max_rollouts: RolloutHistory's max_tokens and max_rollouts.
    overhead_tokens: how many tokens' worth of time a forward takes before its first token. With B sequences drafted for
    together, a verified node costs 1 token and saves, with its probability p, a B-th of a forward: it pays where
    p > B / (B + overhead_tokens), and is not drafted elsewhere. About 32 on a CPU (SmolLM2-135M in float32: 190 ms and
    4.7 ms a token), 300 on a GPU (its FLOP/s over its bytes/s); inf drafts whatever is found.
    Only prompts in flight are indexed: their own text, at most 2 max_rollouts finished texts, and those in flight.
    """

    def __init__(
        self,
        *,
        min_match: int,
        max_match: int = 16,
        max_history: int = 8_000_000,
        max_rollouts: int = 32,
        overhead_tokens: float = 32.0,
    ) -> None:
        assert min_match >= 1
        assert overhead_tokens > 0
        self._min_match = min_match
        self._max_match = max(max_match, min_match)
        self._max_rollouts = max_rollouts
        self._overhead_tokens = overhead_tokens
        self._flights: dict[str, _Flight] = {}
        self._history = RolloutHistory(max_tokens=max_history, max_rollouts=max_rollouts)

    def begin(self, prompt_id: str, sample: int, prompt_ids: Sequence[int]) -> None:
        """A sequence starts, or starts over; what a lost one had said is kept, for it is about to be said again."""
        flight = self._flights.get(prompt_id)
        if flight is not None and sample in flight.running:
            self.finish(prompt_id, sample)
            flight = self._flights.get(prompt_id)
        if flight is None or len(flight.index.texts) > len(flight.running) + 2 * self._max_rollouts:
            flight = self._index(prompt_id, list(prompt_ids), flight)
            self._flights[prompt_id] = flight
        flight.running[sample] = flight.start(())

    def extend(self, prompt_id: str, sample: int, token_ids: Sequence[int]) -> None:
        """These tokens were committed to the sequence."""
        flight = self._flights[prompt_id]
        flight.index.extend(flight.running[sample], token_ids)

    def finish(self, prompt_id: str, sample: int) -> None:
        """Keep the response for siblings and later epochs; with the prompt's last sequence its index goes."""
        flight = self._flights[prompt_id]
        response = flight.response(sample)
        del flight.running[sample]
        if not flight.running:
            del self._flights[prompt_id]
        self._history.add(prompt_id, response)

    def propose(self, states: Sequence[DraftState], strategy: Strategy) -> list[Draft]:
        """One draft a state, EMPTY where nothing is worth proposing."""
        min_probability = len(states) / (len(states) + self._overhead_tokens)
        return [self._propose(state, strategy, min_probability) for state in states]

    def state_dict(self) -> dict[str, Any]:
        """Finished rollouts, oldest first. Sequences in flight are not part of it: a resumed run begins them again.

        The responses are this drafter's own arrays, never mutated and not copied; JSON-able with default=list.
        """
        return {"finished": self._history.dump()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state, arrays or lists, replacing the present one; nothing is in flight afterwards."""
        self._flights.clear()
        self._history.load(saved_rollouts(state))

    def _propose(self, state: DraftState, strategy: Strategy, min_probability: float) -> Draft:
        depth = min(strategy.depth, state.max_tokens - 1)  # the last token has no successor to verify
        if strategy.source == "off" or depth < 1 or strategy.num_verify < 1:
            return EMPTY
        matches = self._flights[state.prompt_id].index.matches(state.token_ids)
        if not matches:
            return EMPTY
        return grow(
            matches,
            depth=depth,
            top_k=strategy.top_k,
            num_verify=strategy.num_verify,
            min_probability=min_probability,
        )

    def _index(self, prompt_id: str, prompt_ids: list[int], running: _Flight | None) -> _Flight:
        """Index a prompt: what is kept of its finished rollouts, then what is in flight."""
        flight = _Flight(prompt_ids, TextIndex(min_match=self._min_match, max_match=self._max_match))
        for response in self._history.of(prompt_id):
            flight.start(response)
        if running is not None:
            for sample in running.running:
                flight.running[sample] = flight.start(running.response(sample))
        return flight
