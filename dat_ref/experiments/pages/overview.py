"""The page "What it learned": how it was measured, and every verdict."""

from __future__ import annotations

from ..models import BASE, NO_OFFSETS, SIDE
from . import offset_ablation, peers, points
from .formatting import Results, accuracy, difference, format_difference, format_share, significant_sign

INTRODUCTION = """\
# What it learned

What the article says of DAT's behaviour it shows on trained networks and photographs. Here small networks are
trained on [scenes](../training.md#scenes), whose objects' masks are known, and its claims are measured, with the
spread over seeds. These are toys on an easy task: that something is not found here does not say that it is not
there in DAT-Tiny on ImageNet.

## What was found
"""

NETWORK = """\
## The small network

A stem of two 3 × 3 convolutions, one deformable block on a map of 12 × 12 with 32 channels and 36 keys, two on 6 ×
6 with 64 channels and 9 keys each: {parameters:,} parameters. It has no local perception unit, so that apart from
the stem and the convolution between the stages only attention moves anything from one place to another. Images are
{side} × {side}, with one object of {least:.0f} to {largest:.0f} pixels radius: which of eight shapes is it?
{epochs} epochs of {scenes:,} scenes in batches of {batch}, AdamW, learning rate {rate:g} with a cosine; no image is
seen twice. All networks see the same scenes; a seed decides first weights and the scenes' order. The last weights
count, not the best.

It learns as far as {trained} of {held_out} held-out scenes, so there is room above and below.
[`dat_nano`](offsets.md), the network that ships, is larger and trained for longer.

```bash
{command}
python -m dat_ref.experiments.study runs --collect
python -m dat_ref.experiments.attention_maps runs
python -m dat_ref.experiments.costs
python -m dat_ref.experiments.offset_ablation
python -m dat_ref.experiments.no_offset_baseline runs/no_offset_baseline
python -m dat_ref.experiments.figures docs/images/experiments
python -m dat_ref.experiments.pages docs/experiments
```

Measured with torch {torch}, on {date}. These pages are written by the last line from the files of the others.

## What was not measured

`dat_nano` and its baseline with other seeds. Networks of the article's size, photographs with
annotations, ImageNet. Recipes tuned for each network. Matching in multiply-adds instead of keys
(`create_model(..., attention="window", match="macs")` builds such networks). Runs on a GPU.
"""


def offsets_verdict(study: Results) -> str:
    """Return whether a network trained with offsets is better than one trained without."""
    change = difference(study, BASE, NO_OFFSETS)
    seeds = len(study["runs"][BASE])
    sentence = {
        1: "The network with offsets is more accurate than the same network trained without",
        0: "That offsets make a more accurate network was not shown",
        -1: "The network with offsets is less accurate than the same network trained without",
    }[significant_sign(change)]
    accuracies = " against ".join(format_share(accuracy(study, name)) for name in (BASE, NO_OFFSETS))
    size = format_difference(change, 100)
    return f"**{sentence}:** {accuracies}, a difference of {size} points over {seeds} seeds."


def page(results: Results) -> str:
    """Return the page."""
    study = results["study"]
    recipe = study["recipe"]
    verdicts = (
        ("Do offsets help?", "ablations.md#offsets", offsets_verdict(study)),
        ("Do points contract onto the object?", "points.md", points.contract_verdict(results)),
        (
            "Are they denser in deeper stages?",
            "points.md#are-they-denser-in-deeper-stages",
            points.density_verdict(results),
        ),
        (
            "Do separate groups go to separate objects?",
            "points.md#do-separate-groups-go-to-separate-objects",
            points.multi_object_verdict(results),
        ),
        ("Attention against windows", "points.md#attention-against-windows", points.attention_verdict(results)),
        (
            "Does the network that ships use its offsets?",
            "offsets.md",
            offset_ablation.ablation_verdict(results["offset_ablation"]),
        ),
        (
            "Would it be as good without?",
            "offsets.md#its-baseline-without-offsets",
            offset_ablation.baseline_verdict(results["no_offset_baseline"]),
        ),
        ("Another attention in its place", "peers.md", peers.verdict(study)),
    )
    network = NETWORK.format(
        parameters=results["costs"]["networks"][BASE]["parameters"],
        side=SIDE,
        least=study["radius"][0] * SIDE,
        largest=study["radius"][1] * SIDE,
        epochs=recipe["epochs"],
        scenes=recipe["scenes_per_epoch"],
        batch=recipe["batch_size"],
        rate=recipe["learning_rate"],
        trained=format_share(accuracy(study, BASE)),
        held_out=study["held_out"],
        command=study["command"],
        torch=study["versions"]["torch"],
        date=study["date"],
    )
    answers = "".join(f"- [{question}]({link}) {verdict}\n" for question, link, verdict in verdicts)
    return "\n".join((INTRODUCTION, answers, network))
