"""What is drafted on the device is what the head's written-out step drafts from the same hidden states.

Texts grow by random numbers of tokens, drafted for or not; are sent back, begun again, and pass their windows and
rings several times over. On a GPU the same runs in fp32, captured in graphs.
"""

import math
from collections.abc import Iterator

import pytest
import torch

import drafter.eagle_serving
from drafter.eagle import EagleConfig, EagleHead
from drafter.eagle_serving import MIN_CATCH_UP, EagleDrafter, positions_caught_up
from drafter.rings import FeatureRings
from drafter.types import Begun, CycleFeatures, Drafts, ResidentDrafter, Rows, Strategy, Texts
from kernels.sample import gumbel_noise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, VOCAB, WINDOW, MAX_NODES, MAX_LENGTH = 32, 60, 20, 15, 160
NUM_ROWS, NUM_TEXTS = 3, 5


def chain(depth: int) -> Strategy:
    return Strategy(source="eagle", depth=depth, top_k=1, num_verify=depth)


def tree(depth: int, top_k: int, num_verify: int) -> Strategy:
    return Strategy(source="eagle", depth=depth, top_k=top_k, num_verify=num_verify)


def a_head(seed: int = 0) -> EagleHead:
    """Random weights, large enough that every input matters, and a vocabulary with gaps."""
    config = EagleConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        draft_vocab=24,
        window=WINDOW,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        max_position_embeddings=512,
        aux_layers=(0, 1, 2),
    )
    head = EagleHead(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() == 2:
                parameter.mul_(15)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        chosen = torch.randperm(VOCAB, generator=generator)[:24].sort().values
        head.d2t.copy_(chosen - torch.arange(24))
        head.t2d.zero_()[chosen] = True
    return head.to(DEVICE)


class Bench:
    """Texts on the device without a policy: random tokens and random hidden states, all of them remembered."""

    def __init__(self, head: EagleHead, *, temperature: float = 1.0, seed: int = 0) -> None:
        self.head = head
        self.temperature = temperature
        self.random = torch.Generator().manual_seed(seed)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=DEVICE)

        self.texts = Texts(zeros(NUM_TEXTS + 1, MAX_LENGTH), zeros(NUM_TEXTS + 1), zeros(NUM_TEXTS + 1))
        self.texts.lengths[NUM_TEXTS] = 1
        keys = torch.randint(-(2**62), 2**62, (NUM_ROWS,), generator=self.random).to(DEVICE)
        nobody = torch.full((NUM_ROWS,), NUM_TEXTS, dtype=torch.int32, device=DEVICE)
        self.rows = Rows(nobody, keys, zeros(NUM_ROWS) + MAX_LENGTH, zeros(NUM_ROWS), zeros(NUM_ROWS, 1))
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=self.random).to(DEVICE)
        self.rings = FeatureRings(
            aux_layers=(0, 1, 2),
            hidden_size=HIDDEN,
            window=16,
            max_nodes=MAX_NODES,
            dtype=torch.float32,
            device=DEVICE,
            sink=None,
        )
        self.drafter = EagleDrafter(
            head.config, embedding=self.embedding, rings=self.rings, temperature=temperature, device=DEVICE
        )
        self.rings.attach(self.texts, num_rows=NUM_ROWS)
        self.drafter.attach(self.texts)
        self.aux: dict[int, dict[int, torch.Tensor]] = {}  # by text and position
        self.origins: dict[int, int] = {}  # by text: what the drafter may look back to
        self.digested: dict[int, int] = {}

    def publish(self) -> None:
        self.drafter.publish(self.head.state_dict(), version=1)

    def begin(self, row: int, text: int, length: int) -> None:
        """A sequence of random tokens takes a row and a text."""
        tokens = torch.randint(0, VOCAB, (length,), generator=self.random).int()
        self.texts.tokens[text, :length] = tokens.to(DEVICE)
        self.texts.lengths[text] = length
        self.rows.text[row] = text
        self.rows.active[row] = 1
        self.drafter.begin([Begun(text, 0, "p", [], length)], [])
        self.rings.begin([text], [length])
        self.aux[text] = {}
        self.origins.pop(text, None)

    def leave(self, row: int) -> None:
        text = int(self.rows.text[row])
        self.rings.release([text])
        self.drafter.release([text])
        self.rows.text[row] = NUM_TEXTS
        self.rows.active[row] = 0

    def commit(self, counts: list[int], num_nodes: int) -> None:
        """Rows commit so many tokens, sampled along random columns of 1 + num_nodes."""
        width = 1 + num_nodes
        aux = torch.randn(3, NUM_ROWS * width, HIDDEN, generator=self.random).to(DEVICE)
        path = torch.stack([torch.randperm(width, generator=self.random) for _ in counts]).int().to(DEVICE)
        for row, count in enumerate(counts):
            text, length = int(self.rows.text[row]), int(self.texts.lengths[self.rows.text[row]])
            for place in range(count):
                forwarded = row * width + int(path[row, place])
                self.aux[text][length - 1 + place] = aux[:, forwarded].flatten()
            new = torch.randint(0, VOCAB, (count,), generator=self.random).int().to(DEVICE)
            self.texts.tokens[text, length : length + count] = new
            self.texts.lengths[text] += count
        none = torch.zeros(NUM_ROWS, num_nodes, dtype=torch.int32, device=DEVICE)
        counts_tensor = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
        features = CycleFeatures(
            num_rows=NUM_ROWS,
            aux=tuple(aux),
            hidden=aux[0],
            counts=counts_tensor,
            path=path,
            num_valid=torch.zeros_like(counts_tensor),
            drafts=Drafts(none, none, none[:, 0]) if num_nodes else None,
        )
        self.rings.observe(self.texts, self.rows, features)

    def propose(self, strategy: Strategy) -> list[list[tuple[int, int]]]:
        """What is drafted, (token, parent) by row."""
        ids, parents = torch.full((2, NUM_ROWS, strategy.num_verify), -7, dtype=torch.int32, device=DEVICE)
        out = Drafts(ids, parents, torch.full((NUM_ROWS,), -7, dtype=torch.int32, device=DEVICE))
        self.drafter.propose(self.texts, self.rows, strategy, out)
        counts = out.num_nodes.tolist()
        lists = zip(counts, ids.tolist(), parents.tolist(), strict=True)
        return [list(zip(i[:n], p[:n], strict=True)) for n, i, p in lists]

    def expected(self, row: int, strategy: Strategy) -> list[tuple[int, int]]:
        """What the head's own step says, one position and one node at a time."""
        text = int(self.rows.text[row])
        known = self.aux.get(text, {})
        if not int(self.rows.active[row]) or not known:
            return []
        newest = int(self.texts.lengths[text]) - 2
        first = max(newest + 1 - positions_caught_up(NUM_ROWS, strategy.depth), min(known))
        if text not in self.origins or self.digested[text] < first:
            self.origins[text] = first
        self.digested[text] = newest + 1
        tokens = self.texts.tokens[text].tolist()
        past = self.head.empty_past()
        positions: list[tuple[int, int | None]] = []  # of what is cached, and its node
        for position in range(self.origins[text], newest + 1):
            state = self.head.fuse(known[position][None])
            output, past = self.step(tokens[position + 1], state, position, past, positions)
            positions.append((position, None))
        nodes: list[tuple[float, int, int | None, int]] = []  # log-probability, token, parent, level
        level: list[tuple[int | None, torch.Tensor, float]] = [(None, output, 0.0)]
        for depth in range(strategy.depth):
            grown = []
            for node, output, above in level:
                logits = self.head.logits(output)[0] / (self.temperature or 1.0)
                if self.temperature:
                    place = torch.tensor([newest + 2 + depth], device=DEVICE)
                    logits = (
                        logits + gumbel_noise(self.rows.keys[row : row + 1], place, VOCAB)[0, self.head.target_ids()]
                    )
                best = logits.log_softmax(0).topk(strategy.top_k)
                for logprob, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    nodes.append((above + logprob, int(self.head.target_ids()[index]), node, depth))
                    grown.append((len(nodes) - 1, output))
            grown.sort(key=lambda pair: -nodes[pair[0]][0])
            level = []
            for node, output in grown[: strategy.top_k]:
                output, past = self.step(nodes[node][1], output, newest + 1 + depth, past, positions, nodes, node)
                positions.append((newest + 1 + depth, node))
                level.append((node, output, nodes[node][0]))
        order = sorted(range(len(nodes)), key=lambda node: -nodes[node][0])[: strategy.num_verify]
        places: dict[int | None, int] = {node: place for place, node in enumerate(order)}
        return [(nodes[node][1], places.get(nodes[node][2], -1)) for node in order]

    @torch.no_grad()
    def step(self, token, state, position, past, positions, nodes=None, node=None):  # type: ignore[no-untyped-def]
        """One step that sees known positions and its ancestors, as far as the window reaches."""
        above = set()
        while node is not None:
            above.add(node)
            node = nodes[node][2]
        seen = [place > position - WINDOW and (other is None or other in above) for place, other in positions]
        visible = torch.tensor([[*seen, True]], device=DEVICE)
        embeds = self.embedding[token][None]
        return self.head.step(embeds, state, torch.tensor([position], device=DEVICE), past, visible)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


STRATEGIES = [chain(1), chain(5), tree(2, 2, 6), tree(4, 3, 9), tree(3, 4, 15)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_drafts_are_those_of_the_written_out_step(strategy: Strategy, temperature: float) -> None:
    bench = Bench(a_head(), temperature=temperature, seed=strategy.depth)
    bench.publish()
    bench.begin(0, 3, 7)
    bench.begin(2, 0, 12)
    assert bench.propose(strategy) == [[], [], []], "nothing is known before the first verification"
    for count in (1, 3, 1, strategy.depth + 1, 2):
        bench.commit([count, 0, 1], 7)
        drafted = bench.propose(strategy)
        assert drafted == [bench.expected(row, strategy) for row in range(NUM_ROWS)]
        assert len(drafted[0]) == min(strategy.num_verify, strategy.top_k + (strategy.depth - 1) * strategy.top_k**2)


@pytest.mark.parametrize("seed", range(4))
def test_texts_come_go_fall_behind_and_outgrow_their_rings(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter.eagle_serving, "CATCH_UP_TOKENS", [8, 48][seed % 2])
    bench = Bench(a_head(), seed=seed)
    bench.publish()
    choice = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(0, count, (1,), generator=choice))

    for row in range(NUM_ROWS):
        bench.begin(row, row, 5 + row)
    for _ in range(40):
        if pick(8) == 0:  # sent back; comes again with the tokens it had or others, in this row and some text
            row = pick(NUM_ROWS)
            if int(bench.rows.text[row]) != NUM_TEXTS:
                bench.leave(row)
            free = sorted(set(range(NUM_TEXTS)) - set(bench.rows.text.tolist()))
            bench.begin(row, free[pick(len(free))], 2 + pick(20))
        counts = [pick(1 + MAX_NODES) if pick(4) == 0 else pick(4) for _ in range(NUM_ROWS)]
        lengths = bench.texts.lengths[bench.rows.text.long()].tolist()
        bench.commit(
            [min(count, MAX_LENGTH - length) for count, length in zip(counts, lengths, strict=True)], MAX_NODES
        )
        strategy = [*STRATEGIES, None, None, None][pick(len(STRATEGIES) + 3)]
        if strategy is not None:
            assert bench.propose(strategy) == [bench.expected(row, strategy) for row in range(NUM_ROWS)]


def test_a_text_that_falls_behind_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter.eagle_serving, "CATCH_UP_TOKENS", 0)
    bench = Bench(a_head())
    bench.publish()
    bench.begin(0, 0, 4)
    bench.commit([1, 0, 0], 0)
    bench.propose(chain(2))
    for _ in range(MIN_CATCH_UP - 1):
        bench.commit([1, 0, 0], 0)
    assert bench.propose(chain(2))[0] == bench.expected(0, chain(2))
    assert bench.origins[0] == 3
    for _ in range(MIN_CATCH_UP + 1):
        bench.commit([1, 0, 0], 0)
    assert bench.propose(chain(2))[0] == bench.expected(0, chain(2))
    assert bench.origins[0] == int(bench.texts.lengths[0]) - 1 - MIN_CATCH_UP


def test_few_rows_catch_up_with_more() -> None:
    assert [positions_caught_up(rows, 5) for rows in (1, 4, 8, 16, 256)] == [32, 32, 16, 8, 8]
    assert positions_caught_up(256, 12) == 13


def test_nothing_is_proposed_without_weights() -> None:
    bench = Bench(a_head())
    bench.begin(0, 0, 4)
    bench.commit([2, 0, 0], 1)
    assert isinstance(bench.drafter, ResidentDrafter)
    assert bench.propose(chain(3)) == [[], [], []]
    bench.publish()
    assert [len(nodes) for nodes in bench.propose(chain(3))] == [3, 0, 0]
    assert bench.drafter.version == 1
    bench.drafter.withdraw()
    assert bench.drafter.version is None
    assert bench.propose(chain(3)) == [[], [], []]


def test_published_weights_are_a_copy() -> None:
    head = a_head()
    bench = Bench(head)
    bench.begin(0, 0, 4)
    bench.commit([2, 0, 0], 1)
    state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    bench.drafter.publish(state, version=1)
    before = bench.propose(tree(3, 3, 9))
    for tensor in state.values():
        tensor.zero_()
    assert bench.propose(tree(3, 3, 9)) == before
    bench.drafter.publish(a_head(seed=9).state_dict(), version=2)
    assert bench.propose(tree(3, 3, 9)) != before


def test_no_storage_is_shared_with_the_policy() -> None:
    bench = Bench(a_head())
    bench.publish()
    embedding = bench.embedding.clone()
    served = bench.drafter._head.by_name(bench.head.config)
    theirs = {bench.embedding.untyped_storage().data_ptr()}
    theirs |= {tensor.untyped_storage().data_ptr() for tensor in bench.head.state_dict().values()}
    assert theirs.isdisjoint({tensor.untyped_storage().data_ptr() for tensor in served.values()})
    bench.begin(0, 0, 4)
    bench.commit([2, 0, 0], 1)
    bench.propose(chain(3))
    assert torch.equal(bench.embedding, embedding)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_wrong_state_is_refused_and_the_old_one_kept(change: str) -> None:
    bench = Bench(a_head())
    bench.publish()
    bench.begin(0, 0, 4)
    bench.commit([2, 0, 0], 1)
    before = bench.propose(chain(4))
    state = dict(a_head(seed=3).state_dict())
    if change == "missing":
        del state["norm.weight"]
    elif change == "unknown":
        state["extra.weight"] = torch.zeros(1)
    else:
        state["fc.weight"] = state["fc.weight"][:, :-1]
    with pytest.raises(ValueError, match="extra.weight|norm.weight|fc.weight"):
        bench.drafter.publish(state, version=2)
    assert bench.propose(chain(4)) == before
    assert bench.drafter.version == 1


def test_a_chain_is_the_first_path_of_a_tree_and_argmaxes_with_the_shared_noise() -> None:
    bench = Bench(a_head(), temperature=0.8)
    bench.publish()
    bench.begin(1, 2, 9)
    bench.commit([0, 3, 0], 3)
    (token, parent), *_ = bench.propose(chain(4))[1]
    assert bench.propose(tree(1, 3, 3))[1][0] == (token, parent)
    bench.drafter.set_temperature(0.0)
    assert bench.drafter._transform.tolist() == pytest.approx([1 / math.log(2), 0.0])


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_captured_draft_follows_new_texts_weights_and_temperatures(strategy: Strategy) -> None:
    bench = Bench(a_head())
    bench.begin(0, 0, 6)
    bench.commit([2, 0, 0], 1)
    ids, parents = torch.zeros(2, NUM_ROWS, strategy.num_verify, dtype=torch.int32, device=DEVICE)
    out = Drafts(ids, parents, torch.zeros(NUM_ROWS, dtype=torch.int32, device=DEVICE))
    bench.drafter.propose(bench.texts, bench.rows, strategy, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bench.drafter.propose(bench.texts, bench.rows, strategy, out)
    assert out.num_nodes.tolist() == [0, 0, 0]
    bench.publish()
    bench.begin(2, 4, 11)
    for temperature in (1.0, 0.0):
        bench.temperature = temperature
        bench.drafter.set_temperature(temperature)
        bench.commit([1, 0, 2], 3)
        graph.replay()
        for row in range(NUM_ROWS):
            count = int(out.num_nodes[row])
            drafted = list(zip(ids[row, :count].tolist(), parents[row, :count].tolist(), strict=True))
            assert drafted == bench.expected(row, strategy)
