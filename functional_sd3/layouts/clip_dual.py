"""CLIP with both encoders in files: the names of transformers' `CLIPModel`, as a table of rules."""

from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts import diffusers_keys, infer, rules
from functional_sd3.layouts.format import Format
from functional_sd3.layouts.rules import Layout, Rule, renamed
from functional_sd3.text.clip import dual as clip_dual

_TEXT, _IMAGE = "text_model.", "vision_model."


def _within(ours: str, table: tuple[Rule, ...], start: str) -> tuple[Rule, ...]:
    """Rules of the text encoder alone as rules below `ours`, whose tensors start with `start` instead."""
    return tuple(
        rule._replace(ours=ours + rule.ours, theirs=tuple(name.replace(_TEXT, start, 1) for name in rule.theirs))
        for rule in table
    )


_TEXT_RULES = diffusers_keys.CLIP.rules
LAYOUT = Layout(
    rules=(
        *_within("text.", _TEXT_RULES, _TEXT),
        *renamed(
            ("logit_scale", "logit_scale"),
            ("image.class_embedding", "vision_model.embeddings.class_embedding"),
            ("image.patch.weight", "vision_model.embeddings.patch_embedding.weight"),
            ("image.position_embedding.{leaf}", "vision_model.embeddings.position_embedding.{leaf}"),
            ("image.first_norm.{leaf}", "vision_model.pre_layrnorm.{leaf}"),
            ("image.final_norm.{leaf}", "vision_model.post_layernorm.{leaf}"),
            ("image.projection.{leaf}", "visual_projection.{leaf}"),
        ),
        *_within("image.", tuple(rule for rule in _TEXT_RULES if rule.ours.startswith("blocks.")), _IMAGE),
    ),
    # Counted positions, which older transformers saved.
    ignored=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
)


def _infer(shapes: infer.Shapes, drops_ones: bool) -> clip_dual.Config:
    try:
        return infer.clip_dual(rules.read_backwards(LAYOUT, shapes), drops_ones)
    except infer.Unreadable as error:
        name = rules.name_of(LAYOUT, error.args[0])
        problem = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
        raise WeightsError(f"{name} {problem}: this is no CLIP model of transformers' layout") from None


FORMAT = Format("transformers", "CLIP", "", r"(text|vision)_model\.", clip_dual.spec, LAYOUT, _infer)
