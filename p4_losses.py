"""What adaptation adds to cross-entropy, one function a loss. The target's labels are nowhere among them.

loss = adversarial(...) + self_training(...)        # scalars, of logits [B, 10] and images [B, 3, 28, 28] in [-1, 1]

`classify(x)` is the network on images of one domain: [B, 3, 28, 28] -> logits [B, 10].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from p4_model import reverse_gradient

RADIUS = 3.5  # of virtual adversarial noise, in the Euclidean norm of a picture's 2,352 values (Shu et al. 2018)
BELIEF = 0.9  # part of the source's mean confidence from which a teacher's digit counts (Berthelot et al. 2022)


def adversarial(domain_logits_of, source, target, lambd):
    """-log D(f(x_s)) - log(1 - D(f(x_t))) of features [B, 128], minimised by the domain classifier `domain_logits_of`,
    maximised by what gives the features, `lambd` times (Ganin et al. 2016, section 4.2; the mean over both domains,
    which is half of the paper's sum of their means)."""
    features = reverse_gradient(torch.cat([source, target]), lambd)
    domain = torch.arange(2, device=source.device).repeat_interleave(len(source))  # p4_model.SOURCE, TARGET
    return F.cross_entropy(domain_logits_of(features).float(), domain)


def self_training(logits, teacher_logits, source_logits):
    """(loss, share of pictures that count): mean over the target of 1[max q >= c] (-log p(argmax q)), where q is the
    teacher's softmax of the untouched picture and p the network's of an augmented view (FixMatch, Sohn et al. 2020,
    eq. 4; the averaged network as teacher: French et al. 2018). c = BELIEF times the mean confidence on the source's
    views (AdaMatch, Berthelot et al. 2022, section 3.2), so that it rises with what the network knows."""
    confidence, digit = teacher_logits.softmax(1).max(1)
    counts = (confidence >= BELIEF * source_logits.detach().softmax(1).amax(1).mean()).float()
    return (counts * F.cross_entropy(logits, digit, reduction="none")).mean(), counts.mean()


def entropy(logits):
    """Mean of H(p) = -sum_k p_k log p_k: boundaries between digits move to where no pictures are (Grandvalet & Bengio
    2005)."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def divergence(p, logits):
    """Mean Kullback-Leibler divergence of softmax(logits) from p [B, 10]."""
    return F.kl_div(logits.log_softmax(1), p, reduction="batchmean")


def virtual_adversarial(classify, x, logits):
    """KL(p(x) || p(x + r)), |r| = RADIUS, r in the direction that changes p most: one step of the power iteration
    (Miyato et al. 2018, algorithm 1)."""
    p = logits.detach().softmax(1)
    r = F.normalize(torch.randn_like(x).flatten(1)).view_as(x).requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(p, classify(x + 0.1 * r)), r)
    return divergence(p, classify(x + RADIUS * F.normalize(gradient.flatten(1)).view_as(x)))


def virtual_mixup(classify, x, logits):
    """KL(m p(x_i) + (1 - m) p(x_j) || p(m x_i + (1 - m) x_j)), m uniform, j drawn for each i: the network is to be
    linear between pictures (Mao et al. 2019, eq. 5)."""
    p, other = logits.detach().softmax(1), torch.randperm(len(x), device=x.device)
    m = torch.rand(len(x), 1, device=x.device)
    mixed = torch.lerp(x[other], x, m.view(-1, 1, 1, 1))
    return divergence(torch.lerp(p[other], p, m), classify(mixed))


def mutual_information(logits):
    """H(mean p) - mean H(p) of p = softmax(logits [N, 10]), 0 to log 10: high where predictions are sure and differ
    (Krause et al. 2010)."""
    mean = logits.softmax(1).mean(0)
    return float(-entropy(logits) - torch.xlogy(mean, mean).sum())


def label_free_score(labelled_accuracy, information):
    """What chooses epochs, hyperparameters and trainings: the accuracy on labelled validation images of the source,
    plus the mutual information of target images and predictions as a part of its greatest value, log 10 (to select by
    it: Musgrave et al. 2022)."""
    return labelled_accuracy + information / math.log(10)
