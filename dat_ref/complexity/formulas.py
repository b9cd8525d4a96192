"""Closed forms of cost by term: parameters, multiply-adds, gathers, bytes saved for the backward pass.

Each operation of the spec has its own formula (``*_macs``). This module groups them into the article's terms,

    Ω = 2HW·Ns·C  +  2HW·C²  +  2Ns·C²  +  (k² + 2)·Ns·C
        attention    query      key and    offset
                     and output value      network

and the terms that it leaves out: sampling, bias, MLP, convolutions, embeddings. `dat_ref.complexity.counting` measures
the same quantities during execution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .._checks import Tree
from ..backbone import dat_shapes, embed_macs
from ..block import SAME_3X3, block_shapes, mlp_macs
from ..config import BlockConfig, DATConfig
from ..ops.basic import depthwise_conv2d_macs, linear_macs
from ..ops.grid import Size
from ..params import count, flatten
from ..peers.attention import Attention
from ..peers.memory import Tape, depthwise_workspace
from ..peers.registry import row_of


@dataclass(frozen=True)
class Term:
    """Cost of one term.

    Args:
        parameters: number of learned parameters.
        macs: multiply-adds.
        interpolated: part of `macs` that weights the four pixels around a point. These are neither matrix products nor
            convolutions; FLOP counters and the articles' totals leave them out.
        gathers: values read at indices that depend on the data.
        saved_bytes: bytes saved for the backward pass.
    """

    parameters: int = 0
    macs: int = 0
    interpolated: int = 0
    gathers: int = 0
    saved_bytes: int = 0

    def __add__(self, other: Term) -> Term:
        return Term(
            self.parameters + other.parameters,
            self.macs + other.macs,
            self.interpolated + other.interpolated,
            self.gathers + other.gathers,
            self.saved_bytes + other.saved_bytes,
        )

    @property
    def products(self) -> int:
        """Multiply-adds of matrix products and convolutions, as in the articles and `torch.utils.flop_counter`."""
        return self.macs - self.interpolated


Terms = dict[str, Term]


def total(terms: Mapping[str, Term] | Iterable[Term]) -> Term:
    """Return the sum of terms.

    >>> total({"attention": Term(macs=3), "sampling": Term(macs=4, interpolated=4)}).products
    3
    """
    return sum(terms.values() if isinstance(terms, Mapping) else terms, Term())


# ------------------------------------------------------------------------------------------------ attentions


def attention_terms(batch: int, size: Size, config: Any, *, itemsize: int = 4) -> Terms:
    """Return the cost of an attention layer by term.

    Args:
        batch: batch size B.
        size: map size (H, W).
        config: configuration of any attention in `dat_ref.peers.ATTENTIONS`.
        itemsize: bytes per element, 4 or 8.

    >>> from dat_ref import DeformableAttentionConfig
    >>> layer = DeformableAttentionConfig(384, heads=12, groups=3, stride=2, kernel_size=5, size=(14, 14))
    >>> terms = attention_terms(1, (14, 14), layer)
    >>> sum(terms[name].macs for name in ("attention", "query and output", "key and value"))
    79629312
    >>> terms["offset network"].macs
    508032
    """
    row = row_of(config)
    tape = Tape(itemsize)
    row.memory(tape, batch, size, config)
    macs = row.terms(batch, size, config)
    parameters = _parameters(row, config)
    interpolated = {name: macs[name] for name in row.interpolated(config) if name in macs}
    gathers = interpolated if row.data_dependent_points(config) else {}
    names = dict.fromkeys([*macs, *parameters, *tape.saved_bytes])  # unique, in this order
    return {
        name: Term(
            parameters.get(name, 0),
            macs.get(name, 0),
            interpolated.get(name, 0),
            gathers.get(name, 0),
            tape.saved_bytes[name],
        )
        for name in names
    }


def _parameters(row: Attention, config: Any) -> dict[str, int]:
    """Return parameters by term; one third of a joint projection ``qkv`` belongs to the queries."""
    parameters: dict[str, int] = {}

    def add(term: str, amount: int) -> None:
        parameters[term] = parameters.get(term, 0) + amount

    for name, shape in flatten(row.shapes(config)).items():
        if name.startswith("qkv."):
            add("query and output", math.prod(shape) // 3)
            add("key and value", math.prod(shape) // 3 * 2)
        else:
            add(row.parameter_term(name), math.prod(shape))
    return parameters


# ------------------------------------------------------------------------------------------------ the block


@dataclass(frozen=True)
class BlockCost:
    """Cost of one part of a backbone: a block, an embedding or the head.

    Args:
        stage: stage number from 1; 0 for a part outside the stages.
        block: block number in its stage, from 1; 0 for an embedding or the head.
        kind: kind of attention, or ``"patch embedding"``, ``"downsampling"``, ``"head"``.
        size: output map size (H, W).
        terms: cost by term.
        peak: peak bytes of its forward pass, without its input.
    """

    stage: int
    block: int
    kind: str
    size: Size
    terms: Terms
    peak: int

    @property
    def total(self) -> Term:
        """Sum of all terms."""
        return total(self.terms)


def block_cost(
    batch: int, size: Size, config: BlockConfig, *, itemsize: int = 4, stage: int = 0, block: int = 0
) -> BlockCost:
    """Return the cost of one block on a map of `size`: terms of its attention and of the rest of the block."""
    pixels = batch * math.prod(size)
    tape = Tape(itemsize)
    _block_memory(tape, batch, size, config)
    attention = attention_terms(batch, size, config.attention, itemsize=itemsize)
    macs = {"mlp": mlp_macs(pixels, config.dim, config.mlp_ratio, config.mlp)}
    if config.local_perception:
        macs["local perception"] = depthwise_conv2d_macs(pixels, config.dim, 3)
    shapes = block_shapes(config)
    parameters = {"mlp": count(shapes["mlp"])}
    if config.local_perception:
        parameters["local perception"] = count(shapes["local_perception"])
    parameters["norms and sums"] = sum(
        count(tree) for name, tree in shapes.items() if name.startswith(("norm", "layer_scale"))
    )
    block_terms: Terms = {
        name: Term(parameters[name], macs.get(name, 0), saved_bytes=tape.saved_bytes[name])
        for name in ("local perception", "mlp", "norms and sums")
        if name in parameters
    }
    return BlockCost(stage, block, config.attention.kind, size, {**attention, **block_terms}, tape.peak)


def _block_memory(tape: Tape, batch: int, size: Size, config: BlockConfig) -> None:
    """Record the memory steps of `block`."""
    elements = batch * math.prod(size) * config.dim
    hidden = config.mlp_ratio * elements
    layer_scale_elements = elements if config.layer_scale is not None else 0
    if config.local_perception:
        tape.step("local perception", elements, depthwise_workspace(batch * config.dim, size, 3, 1, SAME_3X3))
    attention = row_of(config.attention)
    if attention.saves_input(config.attention):
        tape.step("norms and sums", elements, elements)  # norm
        attention.memory(tape, batch, size, config.attention)
    else:
        with tape.temporary(elements, workspace=elements):
            attention.memory(tape, batch, size, config.attention)
    tape.step("norms and sums", elements, layer_scale_elements)  # sum
    tape.step("norms and sums", elements, elements)  # norm
    tape.step("mlp", hidden)
    if config.mlp != "linear":
        maps = batch * config.dim * config.mlp_ratio
        tape.step("mlp", hidden, depthwise_workspace(maps, size, 3, 1, SAME_3X3))
    tape.step("mlp", hidden, hidden)  # GELU
    tape.step("mlp", elements)
    tape.step("norms and sums", elements, layer_scale_elements)  # sum


# ------------------------------------------------------------------------------------------------ the backbone


@dataclass(frozen=True)
class BackboneCost:
    """Cost of a backbone: its parts in execution order."""

    image_size: Size
    batch: int
    parts: tuple[BlockCost, ...]

    @property
    def total(self) -> Term:
        """Sum over all parts."""
        return total([part.total for part in self.parts])

    @property
    def terms(self) -> Terms:
        """Sum over all parts by term, in order of first appearance."""
        names = dict.fromkeys(name for part in self.parts for name in part.terms)
        return {name: total([part.terms.get(name, Term()) for part in self.parts]) for name in names}

    @property
    def peak(self) -> int:
        """Peak bytes of a forward pass that returns no trace.

        While a block runs, the traces of the previous block and of the embedding before the stage are still in memory.
        """
        peak = stage_input = previous_block = stage = 0
        for part in self.parts:
            peak = max(peak, part.peak + (stage_input + previous_block if part.stage else 0))
            if part.block:
                previous_block = part.total.saved_bytes
            else:
                stage_input = part.total.saved_bytes + (stage_input if part.stage == stage else 0)
            stage = part.stage
        return peak


def backbone_cost(batch: int, size: Size, config: DATConfig, *, itemsize: int = 4) -> BackboneCost:
    """Return the cost of a backbone on images of `size`, part by part.

    >>> import dat_ref
    >>> cost = backbone_cost(1, (224, 224), dat_ref.config("dat_tiny"))
    >>> cost.total.parameters, cost.total.products
    (28319138, 4563459840)
    """
    shapes, image_size = dat_shapes(config), size
    parts: list[BlockCost] = []
    for number, part in enumerate(shapes["patch_embedding"]):
        cost = _embed_cost(batch, size, part, itemsize, 1, "patch embedding", with_gelu=number > 0)
        parts.append(cost)
        size = cost.size
    for index, blocks in enumerate(config.stages):
        if index:
            cost = _embed_cost(batch, size, shapes["downsamples"][index - 1], itemsize, index + 1, "downsampling")
            parts.append(cost)
            size = cost.size
        for number, block_config in enumerate(blocks, start=1):
            parts.append(block_cost(batch, size, block_config, itemsize=itemsize, stage=index + 1, block=number))
    parts.append(_head_cost(batch, size, config, shapes, itemsize))
    return BackboneCost(image_size, batch, tuple(parts))


def _embed_cost(
    batch: int, size: Size, shapes: Tree, itemsize: int, stage: int, kind: str, with_gelu: bool = False
) -> BlockCost:
    """Return the cost of a strided convolution and its norm, and of a preceding GELU if `with_gelu`."""
    channels_out, channels_in, kernel, _ = shapes["projection"]["weight"]
    macs, output_size = embed_macs(batch, size, channels_in, channels_out, kernel)
    outputs = batch * math.prod(output_size)
    tape = Tape(itemsize)
    if with_gelu:
        tape.step(kind, batch * channels_in * math.prod(size), batch * channels_in * math.prod(size))
    workspace = batch * channels_in * math.prod(size) + outputs * (channels_in + channels_out)
    tape.step(kind, outputs * channels_out, workspace)
    tape.step(kind, outputs * channels_out, outputs * channels_out)
    terms = {kind: Term(count(shapes), macs, saved_bytes=tape.saved_bytes[kind])}
    return BlockCost(stage, 0, kind, output_size, terms, tape.peak)


def _head_cost(batch: int, size: Size, config: DATConfig, shapes: Tree, itemsize: int) -> BlockCost:
    dim = config.dims[-1]
    elements = batch * dim * math.prod(size)
    tape = Tape(itemsize)
    tape.step("head", elements, elements)  # norm
    positions = math.prod(size) if config.global_pool == "" else 1
    if config.global_pool == "avg":
        tape.step("head", batch * dim)
    tape.step("head", batch * config.num_classes * positions)
    parameters = count(shapes["norm"]) + count(shapes.get("head", {}))
    macs = linear_macs(batch * positions, dim, config.num_classes)
    return BlockCost(
        0, 0, "head", size, {"head": Term(parameters, macs, saved_bytes=tape.saved_bytes["head"])}, tape.peak
    )
