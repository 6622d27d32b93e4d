"""KL divergence of a model in training from its base, from the base's likeliest tokens alone.

Per position the base's K likeliest tokens are kept, and the rest of the vocabulary counts as one token. So a position
takes 8 K bytes instead of a row of logits, and the divergence is a lower bound of the full one, close to it for greedy
answers, whose distributions are concentrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LIKELIEST = 128  # tokens kept per position


@dataclass(frozen=True)
class Likeliest:
    """The base's likeliest tokens at R positions. ids: (R, K) int32; log_probs: (R, K) float32, in nats."""

    ids: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> Likeliest:
        """Return them from the base's logits (R, V)."""
        log_probs, ids = logits.float().log_softmax(dim=-1).topk(min(LIKELIEST, logits.shape[-1]), dim=-1)
        return cls(ids.int().cpu(), log_probs.cpu())

    def divergence(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return KL(base || model) in nats, (R,), and whether both have the same likeliest token, (R,), from the model's
        logits (R, V) at the same positions."""
        scores = logits.float()
        ids, base = self.ids.to(scores.device).long(), self.log_probs.to(scores.device)
        model = scores.gather(1, ids) - scores.logsumexp(dim=1, keepdim=True)
        divergence = (base.exp() * (base - model)).sum(dim=1)
        rest, rest_of_model = _rest(base), _rest(model)
        divergence += rest * (rest.clamp_min(1e-12).log() - rest_of_model.clamp_min(1e-12).log())
        return divergence, scores.argmax(dim=1) == ids[:, 0]


def _rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the probability of all other tokens, (R,). log_probs: (R, K)."""
    return (1 - log_probs.exp().sum(dim=1)).clamp_min(0)
