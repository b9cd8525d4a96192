"""The page "What it learned": how it was measured, and every verdict."""

from __future__ import annotations

from ..small import BASE, SIDE, STILL
from . import knock_out, peers, points
from .words import Found, accuracy, difference, outside, share, signed

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
python -m dat_ref.experiments.looks runs
python -m dat_ref.experiments.costs
python -m dat_ref.experiments.knock_out
python -m dat_ref.experiments.twin runs/twin
python -m dat_ref.experiments.figures docs/images/experiments
python -m dat_ref.experiments.pages docs/experiments
```

Measured with torch {torch}, on {date}. These pages are written by the last line from the files of the others.

## What was not measured

`dat_nano` and its twin with other seeds. Networks of the article's size, photographs with
annotations, ImageNet. Recipes tuned for each network. Matching in multiply-adds instead of keys
(`create_model(..., attention="window", match="macs")` builds such networks). Runs on a GPU.
"""


def offsets_verdict(study: Found) -> str:
    """Return whether a network trained with offsets is better than one trained without."""
    change = difference(study, BASE, STILL)
    seeds = len(study["runs"][BASE])
    told = {
        1: "The network with offsets is more accurate than the same network trained without",
        0: "That offsets make a more accurate network was not shown",
        -1: "The network with offsets is less accurate than the same network trained without",
    }[outside(change)]
    return (
        f"**{told}:** {share(accuracy(study, BASE))} against {share(accuracy(study, STILL))}, a difference of "
        f"{signed(change, 100)} points over {seeds} seeds."
    )


def page(found: Found) -> str:
    """Return the page."""
    study = found["study"]
    recipe = study["recipe"]
    verdicts = (
        ("Do offsets help?", "ablations.md#offsets", offsets_verdict(study)),
        ("Do points contract onto the object?", "points.md", points.contract_verdict(found)),
        ("Are they denser in deeper stages?", "points.md#are-they-denser-in-deeper-stages", points.deeper(found)),
        (
            "Do separate groups go to separate objects?",
            "points.md#do-separate-groups-go-to-separate-objects",
            points.several_verdict(found),
        ),
        ("Attention against windows", "points.md#attention-against-windows", points.attention_verdict(found)),
        ("Does the network that ships use its offsets?", "offsets.md", knock_out.uses(found["knock_out"])),
        ("Would it be as good without?", "offsets.md#its-twin-without-offsets", knock_out.better(found["twin"])),
        ("Another attention in its place", "peers.md", peers.verdict(study)),
    )
    network = NETWORK.format(
        parameters=found["costs"]["networks"][BASE]["parameters"],
        side=SIDE,
        least=study["radius"][0] * SIDE,
        largest=study["radius"][1] * SIDE,
        epochs=recipe["epochs"],
        scenes=recipe["scenes_per_epoch"],
        batch=recipe["batch_size"],
        rate=recipe["learning_rate"],
        trained=share(accuracy(study, BASE)),
        held_out=study["held_out"],
        command=study["command"],
        torch=study["versions"]["torch"],
        date=study["date"],
    )
    told = "".join(f"- [{question}]({link}) {verdict}\n" for question, link, verdict in verdicts)
    return "\n".join((INTRODUCTION, told, network))
