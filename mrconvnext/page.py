"""The page of ``mrconvnext plot``: what a model looks at, in one HTML file. Needs matplotlib, as `plots` does."""

import base64
import io
from html import escape
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from timm.models.convnext import ConvNeXt
from torch import Tensor

from . import plots
from .convert import local_taps_of
from .hub import form_of, is_deployed
from .mrconvnext import MRConvNeXt

# A pixel is seen if its gradient is at least this fraction of the largest.
SEEN = 1e-3

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #fff; --soft: #57606a; --line: #d0d7de; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --page: #0f1318; --soft: #9aa4af; --line: #343b44; } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
  color: var(--text); background: var(--page); }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .5rem; }
h1, section > h3 { margin-top: 0; } p { max-width: 44rem; } table { border-collapse: collapse; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { white-space: nowrap; }
figure { margin: 0; color: var(--soft); font-size: .875rem; line-height: 1.4; }
img { display: block; height: auto; background: #fff; border-radius: 4px; }
figure img { width: 100%; margin-bottom: .25rem; } .scroll { overflow-x: auto; }
.grid { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
.pair { display: grid; gap: .75rem; grid-template-columns: 1fr 1fr; }
"""


def make_page(model: MRConvNeXt, plain: ConvNeXt, fields: list[list[Tensor]], source: str, images: str) -> str:
    """Returns a page of HTML that needs nothing beside it: facts, receptive fields, α and kernels of a model.

    Args:
        model: The model, in either form.
        plain: The ConvNeXt to stand beside it, `convert.without_branches`.
        fields: The receptive fields (H, W) of the stages of both, `plots.receptive_fields`.
        source: What the model was read from, in words.
        images: What the receptive fields were taken on, in words.
    """
    title = escape(f"What {model.pretrained_cfg['architecture']} looks at")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body><main>
<h1>{title}</h1>
{_facts(model, source)}{_fields(model, fields, images)}{_weights(model)}{_kernels(model, plain)}</main></body>
</html>
"""


def _facts(model: Any, source: str) -> str:
    made_for = "×".join(map(str, model.model_args["img_size"]))
    facts = {
        "Read from": source,
        "Architecture": model.pretrained_cfg["architecture"],
        "Form": form_of(model),
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} million",
        "Image size": f"{'×'.join(map(str, model.pretrained_cfg['input_size'][1:]))}, kernels made for {made_for}",
    }
    for i, (layer, info) in enumerate(zip(_first_layers(model), model.feature_info)):
        lengths = f"branches: {', '.join(map(str, layer.branch_lengths))} lags"
        if layer.kernel is not None:
            lengths = f"branches folded into one kernel of {layer.kernel.shape[1]} lags"
        facts[f"Stage {i + 1}"] = f"blocks: {len(model.stages[i].blocks)}; stride: {info['reduction']}; {lengths}"
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{escape(value)}</td></tr>\n' for name, value in facts.items())
    return f"<table>\n{rows}</table>\n"


def _first_layers(model: Any) -> list[Any]:
    return [stage.blocks[0].conv_dw for stage in model.stages]


def _image(figure: Figure, alt: str) -> str:
    """Returns an image that holds its own bytes, of 256 colours, and of two pixels for one of the page."""
    drawn, memory = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=160)
    with Image.open(drawn) as image:
        # Unlike the others this method keeps the colours of the few pixels that matter most.
        small = image.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(memory, format="png", optimize=True)
    size = f'width="{small.width // 2}" height="{small.height // 2}"'
    data = base64.b64encode(memory.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" {size}>'


def _figure(figure: Figure, where: str, caption: str) -> str:
    return f"<figure>{_image(figure, f'{where}. {caption}')}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _fields(model: MRConvNeXt, fields: list[list[Tensor]], images: str) -> str:
    seen = [[100 * (field >= SEEN).float().mean().item() for field in own] for own in fields]
    sections = ""
    for stage in range(len(fields[0])):
        sections += f'<section>\n<h3>Stage {stage + 1}</h3>\n<div class="pair">\n'
        for name, own, shares in zip(("This model", "Plain ConvNeXt"), fields, seen):
            sections += _figure(plots.plot_field(own[stage]), f"Stage {stage + 1}", f"{name}: {_share(shares[stage])}")
        sections += "</div>\n</section>\n"
    words = [tuple(map(_share, both)) for both in zip(*seen)]
    texts = [f"in stage {i}, {own} (plain ConvNeXt {other})" for i, (own, other) in enumerate(words, start=1)]
    gaps = [own - other for own, other in zip(*seen)]
    ahead = f"is farthest ahead {texts[gaps.index(max(gaps))]}" if max(gaps) > 0 else "is ahead in none"
    return f"""<h2>What each stage sees</h2>
<p>The pictures show an image's pixels: the brighter a pixel, the more the features in the middle of the stage's map
change with it. Taken on {escape(images)}; the colours are the size of the gradient over the largest.</p>
{_image(plots.plot_field_colours(), "Black is a ten-thousandth of the largest gradient, or less; white is the largest")}
<p>Below each picture stands how much of the image is seen: the pixels whose gradient is at least a thousandth of the
largest. This model sees the most {texts[seen[0].index(max(seen[0]))]}, and {ahead}.</p>
<p>{about_plain(model)}</p>
<div class="grid" style="--least: 25rem">
{sections}</div>
"""


def about_plain(model: MRConvNeXt) -> str:
    """Returns in words what `convert.without_branches` makes of an MRConvNeXt, and what that can't show."""
    layers = [stage.blocks[0].conv_dw for stage in model.stages]
    new = [str(stage) for stage, layer in enumerate(layers, start=1) if local_taps_of(layer) is None]
    if layers[0].kernel is None:
        text = "The plain ConvNeXt is this model with its branches closed, α = 0: all other weights are the same."
    else:
        text = "The branches of this model are folded into its kernels. The plain ConvNeXt has the local taps that are "
        text += "kept beside these, if there are any, and all other weights of the model."
        if not layers[0].norm_is_linear:
            text += " Its biases hold what the norms of the branches add."
    if new:
        where = f"stage{'s' if len(new) > 1 else ''} {', '.join(new)}"
        text += f" There are no local taps in {where}: its convolutions there are new, 7×7 and random."
    scales = [block.gamma for stage in model.stages for block in stage.blocks]
    if all(scale is not None and scale.abs().max() < 1e-3 for scale in scales):
        text += " All layer scales are below a thousandth, as in a new model: its blocks add next to nothing yet."
    return text + " A ConvNeXt that was trained by itself may have learned to look elsewhere."


def _share(percent: float) -> str:
    return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


def _weights(model: MRConvNeXt) -> str:
    if is_deployed(model):
        return ""
    alt = "Root mean square of α, by layer and branch"
    return f"""<h2>How much each branch weighs</h2>
<p>A column is a layer, the first at the left; a row is a branch, the shortest at the top. The number is the root mean
square of α over the channels: the larger, the more the layer makes of the branch.</p>
<div class="scroll" tabindex="0" role="region" aria-label="{alt}">{_image(plots.plot_alpha_norms(model), alt)}</div>
"""


def _kernels(model: MRConvNeXt, plain: ConvNeXt) -> str:
    sections = ""
    for stage, (layer, conv) in enumerate(zip(_first_layers(model), _first_layers(plain)), start=1):
        grid = "×".join(map(str, layer.reference_grid))
        sections += f'<h3>Stage {stage}, grid {grid}</h3>\n<div class="grid" style="--least: 17rem">\n'
        for text, figure in plots.plot_layer(layer, conv).items():
            sections += _figure(figure, f"Stage {stage}", text)
        sections += "</div>\n"
    channel = "whose kernel is largest" if is_deployed(model) else "whose branches weigh most"
    return f"""<h2>The kernels</h2>
<p>The first layer of each stage, of the channel {channel}. Red is below zero, blue above, and the middle is the pixel
itself: a kernel that has colour far from there looks far.</p>
{sections}"""
