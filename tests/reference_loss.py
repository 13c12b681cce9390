"""Loss and gradients of core/reference.py with the parameters of a model: the oracle of several tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip_ov2.core import CaptionModel, gather_tokens, reference


def heads_of(model: CaptionModel) -> tuple[int, int]:
    return model.visual.transformer.resblocks[0].attn.num_heads, model.text_decoder.config.heads


def gradients_of_reference(
    model: CaptionModel, images: Tensor, ids_BL: Tensor, kept_BK: Tensor, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean nll, the gradient of the loss by each trainable parameter) in float64, on the CPU.

    The loss is the mean nll unless label smoothing or a z-loss (the weight of the squared log partition function) is
    asked for.
    """
    params = {name: value.detach().double().cpu() for name, value in model.state_dict().items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in trained:
        params[name].requires_grad_()
    images, heads, fusion = images.detach().double().cpu(), heads_of(model), model.text_decoder.config.fusion
    eos_id = model.text_config.eos_id
    nll = loss = reference.caption_loss(params, images, ids_BL, kept_BK, heads=heads, fusion=fusion, eos_id=eos_id)
    if smoothing or z_loss:
        kept_BKD = gather_tokens(reference.encode(params, images, heads[0]), kept_BK)
        logits_TV = reference.decode(params, kept_BKD, ids_BL[:, :-1], heads[1], fusion).flatten(0, 1)
        labels_T = reference.targets(ids_BL, eos_id).flatten()
        real_TV, real_T = logits_TV[labels_T >= 0], labels_T[labels_T >= 0]
        loss = F.cross_entropy(real_TV, real_T, label_smoothing=smoothing)
        loss = loss + z_loss * real_TV.logsumexp(dim=1).square().mean()
    gradients = torch.autograd.grad(loss, [params[name] for name in trained])
    return nll.detach(), dict(zip(trained, gradients, strict=True))
