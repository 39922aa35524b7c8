"""What a rank sends in one optimizer step, as a formula: arithmetic alone, nothing is measured.

As deepspeed 0.19.8 does it under ``ds_configs/*.json``, and PyTorch's DDP;
``tests/distributed/test_traffic.py`` counts real runs and finds these numbers to the byte.

Letters: N ranks; P trained parameters; k micro-batches a step; b bytes per number, 4 in fp32 and 2
in bf16. What one rank hands to its collectives in a step:

=========  =======================================  =======================
engine     gradients                                weights
=========  =======================================  =======================
ddp zero0  all-reduce of 4P                         none
zero1      all-reduce of bP                         all-gather of bP
zero2      k × all-reduce of bP                     all-gather of bP
zero3      k × reduce-scatter of bP                 k × all-gather of bP
=========  =======================================  =======================

- ZeRO-1 and 2 send whole gradients to every rank, by all-reduce, although a rank keeps only its
  part (DeepSpeed's ``use_multi_rank_bucket_allreduce``, on by default). ZeRO-1 does so once a step.
  ZeRO-2, which may not keep a whole gradient, does so after every micro-batch. The weights that a
  rank has updated go to the others after the step, in the type that the forward pass uses.
- ZeRO-3 gathers weights once a micro-batch, not once in the forward and once in the backward pass:
  it keeps what comes again within ``stage3_max_reuse_distance``, 10⁹ elements, so a model of these
  sizes is whole from forward to backward, with gradient checkpointing too. Tensors of up to
  ``stage3_param_persistence_threshold`` elements stay whole and are gathered once a step instead.
- Padding: ZeRO-1 and 2 gather each group of the optimizer (matrices, vectors, spread experts)
  padded to a multiple of 2N; ZeRO-3 pads every tensor to a multiple of N.
- Offload changes where numbers lie, not what is sent, but for the width of ZeRO-3's norms.

**Expert parallelism** over groups of G ranks: a rank has 1/G of the experts' parameters, and they
are reduced and gathered as above over the N/G ranks that have the same ones. Each layer with
experts, those of multi-token prediction too, exchanges rows of D numbers by all-to-all, one for
each of a token's K experts: to the expert and back, forward and backward, 4 × tokens × K × D × b
bytes a micro-batch, of which 1 − 1/G leave the rank if the experts are evenly used. Gradient
checkpointing repeats the forward part: 6 instead of 4. Tokens are positions, padding too. Before
each exchange the ranks tell each other their counts, one int64 an expert.

**On the wire**, by ring algorithms, a rank sends 2(N − 1)/N × S for an all-reduce of S bytes and
(N − 1)/N × S for the others; S is the whole tensor, of all ranks together. What a library adds
(headers, acknowledgements) and what is sent outside of a step's training (start, logging,
evaluation, checkpoints) is not in it. Gloo has no reduce-scatter and sends an all-reduce instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
GPUS_PER_NODE = 8

# What ds_configs/zero3.json and DeepSpeed's defaults say, in elements.
PERSISTENCE_THRESHOLD = 1_000
MAX_REUSE_DISTANCE = 10**9

# Of S bytes, how many times (N − 1)/N × S a ring of N ranks makes each of them send.
RING_PASSES = {
    "all_reduce": 2,
    "reduce_scatter": 1,
    "all_gather": 1,
    "all_to_all": 1,
    "broadcast": 1,
}
BOOKKEEPING = "bookkeeping"


@dataclass(frozen=True)
class ModelShape:
    """Elements of a model's parameter tensors; no tensor is in two of the fields.

    ``matrices`` and ``vectors`` are trained, with and without weight decay; ``experts`` are
    (E, F, D) of each layer's stacked experts, ``experts_per_token`` of them used by a token;
    ``frozen`` tensors neither train nor run. ``buffers`` is in elements of fp32.
    """

    matrices: tuple[int, ...]
    vectors: tuple[int, ...]
    experts: tuple[tuple[int, int, int], ...] = ()
    experts_per_token: int = 0
    frozen: tuple[int, ...] = ()
    buffers: int = 0


@dataclass(frozen=True)
class StepShape:
    """How a step is done: ``engine`` is one of ENGINES, ``micro_batch_tokens`` are one rank's."""

    engine: str
    world_size: int
    micro_batches: int
    micro_batch_tokens: int
    bf16: bool = False
    expert_parallel_size: int = 1
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank hands in one step to one kind of collective, of ``ranks`` ranks.

    ``bytes`` are those of the whole tensors: of an all-reduce or broadcast the tensor, of a
    reduce-scatter what goes in, of an all-gather what comes out, of an all-to-all what goes in, the
    rank's part for itself included. The ranks are every ``stride``-th.
    """

    purpose: str
    kind: str
    ranks: int
    bytes: int
    stride: int = 1

    @property
    def sent(self) -> Fraction:
        """Bytes that a rank puts on the wire under a ring algorithm (all-to-all: directly)."""
        return Fraction(RING_PASSES[self.kind] * (self.ranks - 1) * self.bytes, self.ranks)

    def sent_between_nodes(self, per_node: int = GPUS_PER_NODE) -> Fraction:
        """The part of :attr:`sent`, as a mean over ranks, that leaves a node of ``per_node`` ranks.

        In a ring in the order of ranks only one of a node's ranks sends to another node. A group
        must lie in one node or fill all of its nodes alike: ValueError.
        """
        here, rest = divmod(per_node, self.stride)  # ranks of the group in a node
        if self.ranks * self.stride <= per_node:
            return Fraction(0)
        if here and (rest or self.ranks % here):
            raise ValueError(
                f"{self.ranks} ranks, every {self.stride}., do not fill nodes of {per_node} alike"
            )
        here = max(here, 1)
        if self.kind == "all_to_all":
            return self.sent * Fraction(self.ranks - here, self.ranks - 1)
        return self.sent / here


def step_traffic(model: ModelShape, step: StepShape) -> list[Traffic]:
    """All that a rank hands to collectives in one optimizer step, experts being evenly used.

    Of one rank alone there is none. Raises ValueError for a combination that no recipe runs, and
    for a model so large that ZeRO-3 would gather its weights more than once a micro-batch.
    """
    _check(model, step)
    gradients_and_weights = {
        "ddp": _replicated,
        "zero0": _replicated,
        "zero1": _zero_1_and_2,
        "zero2": _zero_1_and_2,
        "zero3": _zero_3,
    }[step.engine]
    found = [*gradients_and_weights(model, step), *_tokens(model, step), *_bookkeeping(model, step)]
    return [traffic for traffic in found if traffic.ranks > 1 and traffic.bytes]


def sent(traffic: Iterable[Traffic]) -> float:
    """Bytes that a rank puts on the wire for all of it."""
    return float(sum(part.sent for part in traffic))


def sent_between_nodes(traffic: Iterable[Traffic], per_node: int = GPUS_PER_NODE) -> float:
    """The part of :func:`sent` that leaves a node, as a mean over its ranks."""
    return float(sum(part.sent_between_nodes(per_node) for part in traffic))


def _check(model: ModelShape, step: StepShape) -> None:
    if step.engine not in ENGINES:
        raise ValueError(
            f"no formula for the engine {step.engine!r}, only for {', '.join(ENGINES)}"
        )
    if step.engine == "zero0" and step.bf16:
        raise ValueError("ZeRO-0 does not run in bf16 here; see ddp, which sends the same")
    size = step.expert_parallel_size
    if size > 1:
        if step.engine in ("ddp", "zero0"):
            raise ValueError(f"experts are not spread under {step.engine}, only under ZeRO-1 to 3")
        flag = f"--expert_parallel_size {size}"
        if not model.experts:
            raise ValueError(f"{flag}: the model has no experts to spread")
        if step.world_size % size or any(E % size for E, _, _ in model.experts):
            raise ValueError(f"{flag} must divide the ranks and the experts of every layer")
    traversed = sum(model.matrices) + sum(3 * E * F * D for E, F, D in model.experts)
    if step.engine == "zero3" and (3 if step.gradient_checkpointing else 2) * traversed > (
        MAX_REUSE_DISTANCE
    ):
        raise ValueError(
            f"{traversed:,} parameters are too many for this formula: ZeRO-3 would not keep them "
            "from forward to backward"
        )


@dataclass(frozen=True)
class _Group:
    """A group of the optimizer: tensors that a rank has before ZeRO splits them, and over whom."""

    purpose: str
    tensors: tuple[int, ...]
    ranks: int
    stride: int = 1
    trained: bool = True

    def traffic(self, what: str, kind: str, number_of_bytes: int) -> Traffic:
        return Traffic(self.purpose + what, kind, self.ranks, number_of_bytes, self.stride)


def _groups(model: ModelShape, step: StepShape) -> list[_Group]:
    """As training/optimizer.py makes them."""
    N, size = step.world_size, step.expert_parallel_size
    if size == 1:
        whole = [n * E * F * D for E, F, D in model.experts for n in (2, 1)]  # gate_up, down
        return [_Group("", (*model.matrices, *whole), N), _Group("", model.vectors, N)]
    spread = tuple(E // size * F * D for E, F, D in model.experts for _ in range(3))  # w1, w2, w3
    return [
        _Group("", model.matrices, N),
        _Group("", model.vectors, N),
        _Group("expert ", spread, N // size, stride=size),
    ]


def _padded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple


def _replicated(model: ModelShape, step: StepShape) -> list[Traffic]:
    found = [
        group.traffic("gradients", "all_reduce", 4 * sum(group.tensors))
        for group in _groups(model, step)
    ]
    if step.engine == "ddp":  # rank 0's buffers, before a step's first forward pass
        found.append(Traffic(BOOKKEEPING, "broadcast", step.world_size, 4 * model.buffers))
    return found


def _zero_1_and_2(model: ModelShape, step: StepShape) -> list[Traffic]:
    width = 2 if step.bf16 else 4
    times = 1 if step.engine == "zero1" else step.micro_batches
    found = []
    for group in _groups(model, step):
        elements = sum(group.tensors)
        found += [
            group.traffic("gradients", "all_reduce", times * width * elements),
            group.traffic("weights", "all_gather", width * _padded(elements, 2 * group.ranks)),
        ]
    return found


def _zero_3(model: ModelShape, step: StepShape) -> list[Traffic]:
    width, k, N = 2 if step.bf16 else 4, step.micro_batches, step.world_size
    found = []
    for group in [*_groups(model, step), _Group("", model.frozen, N, trained=False)]:
        large = [n for n in group.tensors if n > PERSISTENCE_THRESHOLD]
        small = [n for n in group.tensors if n <= PERSISTENCE_THRESHOLD]
        gathered, kept = (sum(_padded(n, group.ranks) for n in part) for part in (large, small))
        if not group.trained:  # nor run: only what stays whole is gathered, after every step
            found.append(group.traffic("weights", "all_gather", width * kept))
            continue
        found += [
            group.traffic("gradients", "reduce_scatter", k * width * (gathered + kept)),
            group.traffic("weights", "all_gather", width * (k * gathered + kept)),
        ]
    return found


def _tokens(model: ModelShape, step: StepShape) -> list[Traffic]:
    """The all-to-alls of spread experts."""
    size, k = step.expert_parallel_size, step.micro_batches
    if size == 1:
        return []
    width = 2 if step.bf16 else 4
    forwards = 2 if step.gradient_checkpointing else 1
    rows = step.micro_batch_tokens * model.experts_per_token
    exchanged = sum(D for _, _, D in model.experts)
    counts = sum(8 * E for E, _, _ in model.experts)
    return [
        Traffic("tokens", "all_to_all", size, k * (2 * forwards + 2) * rows * exchanged * width),
        Traffic(BOOKKEEPING, "all_to_all", size, k * forwards * counts),
    ]


def _bookkeeping(model: ModelShape, step: StepShape) -> list[Traffic]:
    """Some hundred bytes: the step's counts, its norms, experts' load."""
    N, size = step.world_size, step.expert_parallel_size
    data = N // size
    # Targets, wishes and how far a save is; expert load.
    counted = 5 * 4 + sum(8 * E for E, _, _ in model.experts)
    if step.engine in ("ddp", "zero0"):
        return [Traffic(BOOKKEEPING, "all_reduce", N, counted)]
    if step.engine == "zero3":  # float64, one for each group
        found = [Traffic(BOOKKEEPING, "all_reduce", N, counted + 2 * 8)]
        if size > 1:
            found.append(Traffic(BOOKKEEPING, "all_reduce", data, 8, stride=size))
            found.append(Traffic(BOOKKEEPING, "all_reduce", size, 8))
        return found
    norms = (3 if size > 1 else 2) * 4
    found = [Traffic(BOOKKEEPING, "all_reduce", N, counted + norms)]
    if size > 1:
        found.append(Traffic(BOOKKEEPING, "all_reduce", data, 4, stride=size))
    return found
