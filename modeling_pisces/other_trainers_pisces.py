"""What other people's trainers and adapters would do without a word: lose the image loss, adapt a frozen tower.

TRL's trainers replace `model.forward` by one that runs the backbone and scores tokens from `lm_head.weight`; drawn
pictures among the labels would be trained as tokens, without their own loss. `PiscesForConditionalGeneration` sends
every such forward through `with_image_loss`. PEFT's `target_modules` match the towers' layers too;
`PISCES_PEFT_EXCLUDE_MODULES` keeps them out, and `PiscesModel` warns where nobody did.
"""

# B rows, T tokens
import functools
import types
import warnings
from typing import Any

import torch
from torch import nn


# For `exclude_modules` of a PEFT configuration, matched against the full name: with it "all-linear" and bare layer
# names reach the language model and nothing else.
PISCES_PEFT_EXCLUDE_MODULES = (
    r"(.*\.)?(vision_tower|multi_modal_projector|gen_vision_tower|gen_projector|gen_head|lm_head)(\..*)?"
)


def warn_of_idle_adapters(gen_vision_tower: nn.Module) -> None:
    """Warn of adapters in the generation tower: it runs without gradients, so that they would never learn anything."""
    idle = [name for name, module in gen_vision_tower.named_modules() if hasattr(module, "base_layer")]
    if any(parameter.requires_grad for name in idle for parameter in _adapter(gen_vision_tower.get_submodule(name))):
        warnings.warn(
            f"{len(idle)} layers of gen_vision_tower carry adapters (such as {idle[0]}), but this tower is frozen and "
            "they will never get a gradient; vision_tower may carry some too. Keep adapters to the language model "
            "with exclude_modules=modeling_pisces.PISCES_PEFT_EXCLUDE_MODULES in the adapter's config, that is "
            f'r"{PISCES_PEFT_EXCLUDE_MODULES}", or name its layers by a regular expression, such as '
            'target_modules=r"model\\.language_model\\..*\\.(q_proj|v_proj)".',
            stacklevel=2,
        )


def _adapter(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if not name.startswith("base_layer.")]


def with_image_loss(forward: Any) -> Any:
    """A forward of TRL's that also gives the image loss of drawn pictures; any other forward as it came.

    At a position whose label is a vector's placeholder, `log_probs` becomes minus the image loss of that vector times
    `image_loss_weight`, so that a trainer which sums them trains both sides: every vector counts as one token.

    Raises:
        ValueError: from the returned forward, if it has no log-probability per token that could carry the image loss.
    """
    function: Any = getattr(forward, "__func__", None)
    if not getattr(function, "__globals__", {}).get("__name__", "").startswith("trl."):
        return forward

    @functools.wraps(function)
    def forward_of_both_sides(self, *args, **kwargs):
        targets = _targets(kwargs.get("labels"), kwargs.get("shift_labels"))
        if targets is None or not bool((targets == self.config.gen_image_token_id).any()):
            return function(self, *args, **kwargs)
        backbones: list[Any] = []
        hook = self.model.register_forward_hook(lambda module, inputs, output: backbones.append(output))
        try:
            outputs = function(self, *args, **kwargs)
        finally:
            hook.remove()
        if getattr(outputs, "image_loss", None) is not None:  # it came from the model's own forward
            return outputs
        return _add_image_loss(self, outputs, backbones[-1], targets, kwargs.get("num_items_in_batch"))

    return types.MethodType(forward_of_both_sides, forward.__self__)


def _targets(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """What each position predicts, (B, T)."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def _add_image_loss(model: Any, outputs: Any, backbone: Any, targets: torch.Tensor, num_items: Any) -> Any:
    # without gradients a trainer only measures here, and takes its loss from logits
    if getattr(outputs, "log_probs", None) is None or (model.training and not torch.is_grad_enabled()):
        raise ValueError(
            "the labels hold drawn pictures, but this trainer's loss (of a TRL before 1.16, or label smoothing, or a "
            "compute_loss_func) knows text alone and would not train drawing. Use finetune.training.sft_trainer."
            "PiscesSFTTrainer, or leave pictures out of the assistant's turns."
        )
    hidden = backbone.last_hidden_state
    targets = targets.to(hidden.device)
    losses = model._image_loss(hidden, targets, backbone)
    if losses["image_loss"] is None:
        return outputs
    follows = nn.functional.pad(backbone.gen_image_mask[:, 1:], (0, 1))
    predicts = ((targets == model.config.gen_image_token_id) & follows)[:, : outputs.log_probs.shape[1]]
    per_vector = -model.config.image_loss_weight * losses["image_loss_per_vector"]
    old = outputs.log_probs
    predicts = predicts.to(old.device)
    outputs.log_probs = old.masked_scatter(predicts, per_vector.to(old.device, old.dtype))
    if outputs.loss is not None:
        count = outputs.label_mask.sum().clamp(min=1) if num_items is None else num_items
        outputs.loss = outputs.loss - (outputs.log_probs.sum() - old.sum()) / count
    for name in ("entropy", "is_top1"):  # metrics of a guess between tokens, which no vector is
        if (values := getattr(outputs, name, None)) is not None:
            setattr(outputs, name, values.masked_fill(predicts, 0))
    return outputs


__all__ = ["PISCES_PEFT_EXCLUDE_MODULES", "warn_of_idle_adapters", "with_image_loss"]
