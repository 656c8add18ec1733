"""Losses of knowledge distillation, as functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher/T) ‖ softmax(student/T)), the mean over rows. Both [N, C], any float dtype; computed in float32.

    The factor T² keeps the size of the gradient the same for every T. Hinton et al., arXiv 1503.02531, section 2.1.
    """
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def with_the_rest(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """The chosen logits [N, k], and one for all other classes together: [N, k + 1] float32. logits [N, C]; indices [N, k] with k < C.

    Their softmax at this temperature has the probabilities of the chosen classes, and the sum of those of the others.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, indices)
    total = scaled.logsumexp(-1, keepdim=True)
    covered = (chosen.logsumexp(-1, keepdim=True) - total).clamp(max=-1e-6)
    return temperature * torch.cat([chosen, total + torch.log1p(-covered.exp())], dim=-1)


def label_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [N, C] with labels [N], the mean over rows whose label is not −100; 0 if there are none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def number_error(student: Tensor, teacher: Tensor, over: Tensor | None = None) -> Tensor:
    """Mean squared error of numbers [N, C] relative to the variance of the teacher's, the mean over C.

    over: the variance, where these are a part of a batch; None: it is taken here.
    """
    theirs = teacher.float()
    variance = theirs.var(dim=0, unbiased=False).mean() if over is None else over
    return F.mse_loss(student.float(), theirs) / variance.clamp(min=1e-6)


def hidden_error(student: Tensor, teacher: Tensor, mask: Tensor, over: Tensor | None = None) -> Tensor:
    """Mean squared error of hidden states [B, S, H] over the positions of mask [B, S], relative to the teacher's mean square.

    The error is relative because deep blocks have larger hidden states, which would otherwise dominate the loss.
    over: the mean square, where these are a part of a batch; None: it is taken here.
    """
    theirs, count = _real(teacher, mask)
    ours, _ = _real(student, mask)
    size = theirs.square().sum() / count if over is None else over
    return (ours - theirs).square().sum() / count / size.clamp(min=1e-12)


def mean_square(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean square of hidden states [B, S, H] over the positions of mask [B, S]: 0-dimensional, float32."""
    real, count = _real(hidden, mask)
    return real.square().sum() / count


def _real(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states in float32 with zeros at padding, and how many numbers are no padding. Multiplied, not selected: a GPU would have to wait for their number."""
    where = mask[:, :, None].float()
    return hidden.float() * where, (where.sum() * hidden.shape[-1]).clamp(min=1)


def relation_divergence(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """KL(teacher ‖ student) of the relations among a layer's queries (or keys, or values), the mean over real positions and heads.

    student and teacher [B, S, H'], each with its own H'. Vectors are split into `heads` parts of width d. The relations of a part A [S, d]
    are softmax(A Aᵀ / √d) over the real positions of mask [B, S]. MiniLMv2, arXiv 2012.15828, eq. 5–7.
    """
    where = mask.bool()
    ours, theirs = _relations(student, where, heads), _relations(teacher, where, heads)  # [B, heads, S, S], log
    divergence = (theirs.exp() * (theirs - ours)).masked_fill(~where[:, None, None, :], 0).sum(-1)  # [B, heads, S]
    return divergence.transpose(1, 2)[where].mean()


def _relations(vectors: Tensor, where: Tensor, heads: int) -> Tensor:
    batch, length, width = vectors.shape
    parts = vectors.float().view(batch, length, heads, width // heads).transpose(1, 2)  # [B, heads, S, d]
    scores = parts @ parts.transpose(2, 3) / (width // heads) ** 0.5
    return F.log_softmax(scores.masked_fill(~where[:, None, None, :], torch.finfo(scores.dtype).min), dim=-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine similarity of student and teacher [B, H], the mean over rows."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """Pool token vectors [B, S, H] to one vector for each text: [B, H], or [B, H · modes] for modes joined by `+`.

    mask [B, S] is 0 at the padding, which is on the right. The arithmetic is that of core/compress/runners/measure.py, on torch tensors so
    that gradients can flow through it.
    """
    return torch.cat([_pool(hidden, mask[:, :, None], mode) for mode in how.split("+")], dim=1)


def _pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Pool with one mode, which has its name in sentence-transformers. mask [B, S, 1]."""
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        last = mask[:, :, 0].sum(1).clamp(min=1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    if mode == "max":
        return hidden.masked_fill(mask == 0, -torch.inf).amax(1)
    weights = mask.to(hidden.dtype)
    if mode == "weightedmean":
        places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
        weights = weights * places[:, None]
    length = weights.sum(1).clamp(min=1)
    return (hidden * weights).sum(1) / (length.sqrt() if mode == "mean_sqrt_len_tokens" else length)
