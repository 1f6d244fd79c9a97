"""What an engine holds on the device from one generate call to the next: the KV cache, rows, the decoder, graphs."""

from dataclasses import dataclass
from math import ceil

from transformers import PreTrainedModel

from configs.errors import PreflightError, ResourceError
from configs.schema import RolloutConfig
from drafter.selfdraft import DraftsAsPolicy
from drafter.types import Drafter, FeatureReader, ResidentDrafter
from rollout.blocks import BlockPool
from rollout.collectives import ranks_of
from rollout.decoder import Decoder, make_decoder
from rollout.fused import FusedDecoder
from rollout.graphs import GraphPool
from rollout.memory import cache_budget
from rollout.model import PagedCache, bytes_per_block, kv_shape
from rollout.residency import Residency
from rollout.sparse import SparseAttention

LENGTH_STEP = 1024  # resident sequences have room for a multiple of so many tokens: graphs outlive a longer prompt
TEXT_BYTES = 256 << 20  # at most, for texts that are only quoted


@dataclass(frozen=True, slots=True)
class Room:
    """What resident cycles keep: so many texts of max_length tokens, and table_width blocks of cache a sequence."""

    num_texts: int
    max_length: int
    table_width: int


def room_for(longest: int, config: RolloutConfig, *, max_nodes: int) -> Room:
    """The room for sequences of up to so many tokens, where a cycle verifies at most max_nodes drafted ones."""
    max_length = -(-longest // LENGTH_STEP) * LENGTH_STEP
    num_rows = config.max_running
    return Room(
        # finished siblings and earlier epochs are quoted from what is left
        num_texts=num_rows + min(3 * num_rows, TEXT_BYTES // (4 * max_length)),
        max_length=max_length,
        # nodes that pad a row near its end attend to themselves past it, at a block that must exist
        table_width=-(-(max_length + max_nodes) // config.block_size),
    )


class Workspace:
    """Made as calls need it, kept while it serves, and made anew, without the graphs that name it, where it does not.

    max_nodes: drafted tokens that a cycle may verify. cache and residency: None until they are provided. kv_blocks and
    max_kv_blocks: the cache's size now and at most, 0 where neither is known yet; a run saves them, since from other
    free memory they could change the batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RolloutConfig,
        *,
        drafter: Drafter | ResidentDrafter | None,
        reader: FeatureReader | None,
        sparse: SparseAttention | None,
        max_nodes: int,
    ) -> None:
        self.graphs = GraphPool(model.device, max_bytes=config.graph_mb << 20)
        self.kv_blocks = config.kv_tokens // config.block_size
        self.max_kv_blocks = 0
        self.cache: PagedCache | None = None
        self.pool = BlockPool(0, config.block_size)
        self.decoder: Decoder | None = None
        self.residency: Residency | None = None
        self._model = model
        self._config = config
        self._drafter = drafter
        self._reader = reader
        self._sparse = sparse
        self._max_nodes = max_nodes

    def provide_cache(self, longest: int, num_sequences: int) -> PagedCache:
        """The KV cache, a larger one where sequences of up to so many tokens can use it.

        Raises ResourceError, before anything is given up where the sequences are too long.
        """
        block_size = self._config.block_size
        blocks_each = -(-longest // block_size)
        if not self._config.kv_tokens:
            num_running = min(self._config.max_running, num_sequences)
            # once: a run that was resumed would measure another number at another time
            self.max_kv_blocks = self.max_kv_blocks or self._affordable_blocks()
            self.kv_blocks = max(self.kv_blocks, min(num_running * blocks_each, self.max_kv_blocks))
        if blocks_each > self.kv_blocks:
            raise ResourceError(
                f"the KV cache holds {self.kv_blocks * block_size} tokens and the longest sequence needs"
                f" {blocks_each * block_size}; set rollout.kv_tokens={blocks_each * block_size} or more"
            )
        if self.cache is not None and self.pool.num_blocks == self.kv_blocks:
            return self.cache
        if self.pool.num_blocks != self.kv_blocks:
            self.residency = None
        self.release()  # before the new one is allocated beside it
        try:
            self.cache = PagedCache(
                self._model.config,
                num_blocks=self.kv_blocks,
                block_size=block_size,
                device=str(self._model.device),
                dtype=self._model.dtype,
            )
        except RuntimeError as error:
            gigabytes = self.kv_blocks * self._bytes_per_block() / 1e9
            raise ResourceError(
                f"no memory for a KV cache of {self.kv_blocks * block_size} tokens ({gigabytes:.1f} GB);"
                f" set a smaller rollout.kv_tokens"
            ) from error
        self.pool = BlockPool(self.kv_blocks, block_size)
        return self.cache

    def provide_rows(self, longest: int) -> tuple[Decoder, Residency]:
        """What resident cycles over the cache need for sequences of up to so many tokens.

        Raises PreflightError where the decoder cannot be lent the sparse attention that there is.
        """
        assert self.cache is not None, "provide the cache first"
        room = room_for(longest, self._config, max_nodes=self._max_nodes)
        decoder, residency = self._provide_decoder(room.max_length), self._provide_residency(room)
        if self._sparse is not None:
            if not isinstance(decoder, FusedDecoder):
                raise PreflightError(
                    f"{type(self._model).__name__} decodes through its own module, which attends to everything; set"
                    " sparse.mode=off"
                )
            num_texts, (num_rows, table_width) = len(residency.texts.lengths), residency.rows.block_tables.shape
            if not self._sparse.attach(self.cache, num_texts=num_texts, num_rows=num_rows, table_width=table_width):
                self.pool.forget()  # a prefix that were found would have no descriptors
        return decoder, residency

    def has_room(self, max_length: int, *, on_rows: bool) -> bool:
        """Whether a sequence may become so long in the present cache and, where it is to be on one, row."""
        if max_length > self.pool.num_blocks * self._config.block_size:
            return False
        return not on_rows or (self.residency is not None and max_length <= self.residency.max_length)

    def is_current(self) -> bool:
        """Whether the parameters are where the decoder reads them, if there is one yet."""
        return self.decoder is None or self.decoder.is_current()

    def release(self) -> None:
        """Give the memory of the KV cache, of what lies beside it and of all graphs back; nobody holds the cache."""
        self.cache = None
        if isinstance(self._drafter, DraftsAsPolicy):
            self._drafter.lend(None)
        if self._sparse is not None:
            self._sparse.release()
        self.graphs.clear()

    def _provide_decoder(self, max_length: int) -> Decoder:
        """The policy's forward; a new one, and no graphs, where the parameters have moved since."""
        if self.decoder is None or not self.decoder.is_current():
            self.graphs.clear()
            self.decoder = make_decoder(self._model)
        if self.decoder.reach(max_length):
            self.graphs.clear()
        return self.decoder

    def _provide_residency(self, room: Room) -> Residency:
        """Rows and texts for sequences of this length; larger ones, and no graphs, where the present are too small."""
        assert self.cache is not None
        if self.residency is None or self.residency.max_length < room.max_length:
            self.graphs.clear()
            drafter = self._drafter
            assert drafter is None or isinstance(drafter, ResidentDrafter)
            self.residency = Residency(
                num_rows=self._config.max_running,
                num_texts=room.num_texts,
                max_length=room.max_length,
                table_width=room.table_width,
                max_nodes=self._max_nodes,
                dummy_block=self.cache.dummy_slot // self._config.block_size,
                device=self._model.device,
                drafter=drafter,
                reader=self._reader,
            )
        return self.residency

    def _bytes_per_block(self) -> int:
        """Of the cache, and of what sparse attention keeps beside it."""
        share = self._sparse.share_of_cache(kv_shape(self._model.config)[0]) if self._sparse else 0.0
        num_bytes = bytes_per_block(self._model.config, self._config.block_size, self._model.dtype)
        return num_bytes + ceil(share * num_bytes)

    def _affordable_blocks(self) -> int:
        """Blocks that the device's memory has room for beside everything else; every rank's, of a shared policy."""
        blocks = cache_budget(str(self._model.device)) // self._bytes_per_block()
        ranks = ranks_of(self._model)
        return blocks if ranks is None else ranks.least(blocks)
