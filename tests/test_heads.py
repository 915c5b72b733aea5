"""Heads on features alone: against scikit-learn, the order of the data, and numbers that break less careful code."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from peft_cl.heads import HEADS, ClassMeansHead, Head, LDAHead, RidgeHead, Sizes, Sums, make_head
from peft_cl.heads.maps import FourierFeatures


WIDTH, CLASSES = 24, 7
#: Name -> (head, options): each head that observes, in its forms.
OBSERVING = {
    "ncm": ("ncm", {}),
    "ncm-cosine": ("ncm", {"metric": "cosine"}),
    "lda": ("lda", {}),
    "lda-unshrunk": ("lda", {"shrinkage": 0.0, "priors": "empirical"}),
    "lda-by-class": ("lda", {"by_class": True}),
    "kernel-lda": ("lda", {"fourier": 40}),
    "ridge": ("ridge", {}),
    "ranpac": ("ridge", {"projection": 40}),
    "ranpac-normalized": ("ridge", {"projection": 40, "normalize": True, "by_class": True}),
    "aligned": ("aligned", {"samples": 8, "epochs": 2}),
    "aligned-class": ("aligned", {"samples": 8, "epochs": 2, "covariance": "class"}),
    "fusion": ("fusion", {}),
    "fusion-of-two": ("fusion", {"prompted": "lda", "weight": 0.5}),
}
SOLVED = [name for name in OBSERVING if not name.startswith(("aligned", "fusion"))]


def data(images: int = 300, seed: int = 0, classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of classes of different sizes, (N, WIDTH), and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator).minimum(
        torch.randint(classes, (images,), generator=generator)
    )
    means = 2 * torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(99))
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(98))
    return means[labels] + torch.randn(images, WIDTH, generator=generator) @ mixing, labels


def head_of(form: str, classes: int = CLASSES) -> Head:
    name, options = OBSERVING[form]
    torch.manual_seed(0)
    head = make_head(name, Sizes(WIDTH, WIDTH), 0, options)
    head.grow(classes, keep=0)
    return head.eval()


def taught(form: str, features: torch.Tensor, labels: torch.Tensor, batch: int = 64, classes: int = CLASSES) -> Head:
    head = head_of(form, classes)
    for part in torch.arange(len(labels)).split(batch):
        head.observe(features[part], labels[part], features[part])
    head.fit()
    return head


def logits(head: Head, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return head(features, features)


# ------------------------------------------------------------------------------------------------ others' code


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 0.3, 1.0])
def test_lda_is_that_of_scikit_learn(shrinkage):
    features, labels = data()
    test, _ = data(50, seed=1)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    theirs.fit(features.double().numpy(), labels.numpy())
    ours = LDAHead(Sizes(WIDTH, WIDTH), CLASSES, shrinkage=shrinkage, priors="empirical")
    ours.observe(features, labels)
    ours.fit()
    expected = torch.from_numpy(theirs.decision_function(test.double().numpy()))
    found = logits(ours, test).double()
    # Up to what all classes of an image share, which no softmax sees.
    torch.testing.assert_close(
        found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True), rtol=1e-3, atol=1e-3
    )
    equal = LDAHead(Sizes(WIDTH, WIDTH), CLASSES, shrinkage=shrinkage)
    equal.observe(features, labels)
    equal.fit()
    shares = torch.bincount(labels, minlength=CLASSES) / len(labels)
    torch.testing.assert_close(
        logits(ours, test) - logits(equal, test), shares.log().expand(50, -1), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("projection", [None, 64])
def test_ridge_is_that_of_scikit_learn(projection):
    features, labels = data()
    test, _ = data(50, seed=1)
    head = RidgeHead(Sizes(WIDTH, WIDTH), CLASSES, projection=projection, ridge=0.05)
    head.observe(features, labels)
    head.fit()
    mapped, mapped_test = (head.map(each).double() for each in (features, test))
    strength = 0.05 * mapped.square().sum().item() / mapped.shape[1]
    theirs = Ridge(alpha=strength, fit_intercept=False).fit(mapped.numpy(), np.eye(CLASSES)[labels.numpy()])
    found = logits(head, test) / head.scale
    torch.testing.assert_close(
        found.double(), torch.from_numpy(theirs.predict(mapped_test.numpy())), rtol=1e-3, atol=1e-3
    )
    residuals = np.eye(CLASSES)[labels.numpy()] - theirs.predict(mapped.numpy())
    assert head.scale.item() == pytest.approx(1 / np.square(residuals).mean(), rel=1e-3)


def test_a_projection_is_the_one_that_its_seed_has_always_drawn():
    """Adapters hold the seed alone. Printed once; numpy promises that this stream stays (NEP 19)."""
    head = RidgeHead(Sizes(2, 2), 0, projection=3)
    expected = torch.tensor([[1.764052, 0.400157, 0.978738], [2.240893, 1.867558, -0.977278]]) / math.sqrt(2)
    torch.testing.assert_close(head.mapping.projection, expected, rtol=0, atol=1e-6)
    assert not torch.equal(RidgeHead(Sizes(2, 2), 0, projection=3, seed=1).mapping.projection, head.mapping.projection)
    assert not [name for name in head.state_dict() if "projection" in name]


def test_fourier_features_are_a_gaussian_kernel():
    """Products of the cosines are the kernel, to the noise of 200,000 draws; they depend on the direction alone."""
    first, second = data(6)[0], data(6, seed=1)[0]
    mapping = FourierFeatures(WIDTH, 200_000, gamma=0.5)
    mapped = [mapping(each) for each in (first, 3 * first, second)]
    torch.testing.assert_close(mapped[0], mapped[1], rtol=0, atol=1e-3)
    cosines = [each[:, WIDTH:] for each in mapped]
    standard = [F.layer_norm(each, (WIDTH,)) for each in (first, second)]
    kernel = torch.exp(-(0.5**2) * torch.cdist(*standard).square() / (2 * WIDTH))
    torch.testing.assert_close(cosines[0] @ cosines[2].T / 200_000, kernel, rtol=0, atol=0.02)
    torch.testing.assert_close(mapped[0][:, :WIDTH], standard[0])


def test_a_kernel_divides_what_no_plane_does():
    """Two rings around each other."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    features = F.normalize(torch.randn(400, 3, generator=generator), dim=-1)
    features = torch.cat([features, (1 + 2 * labels[:, None]) * features.flip(-1)], dim=-1)
    found = {}
    for fourier in (None, 200):
        head = LDAHead(Sizes(6, 6), 2, fourier=fourier)
        head.observe(features[:200], labels[:200])
        head.fit()
        found[fourier] = (logits(head, features[200:]).argmax(-1) == labels[200:]).float().mean().item()
    assert found[None] < 0.65 and found[200] > 0.85, found


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_class_means_answer_with_the_nearest(metric):
    features, labels = data()
    test, _ = data(50, seed=1)
    head = taught("ncm" if metric == "euclidean" else "ncm-cosine", features, labels)
    means = torch.stack([features[labels == row].mean(0) for row in range(CLASSES)])
    if metric == "euclidean":
        expected = torch.cdist(test, means).argmin(-1)
    else:
        expected = F.cosine_similarity(test[:, None], means[None], dim=-1).argmax(-1)
    assert torch.equal(logits(head, test).argmax(-1), expected)


def test_lda_with_full_shrinkage_is_nearest_class_mean():
    features, labels = data()
    head = LDAHead(Sizes(WIDTH, WIDTH), CLASSES, shrinkage=1.0)
    head.observe(features, labels)
    head.fit()
    assert torch.equal(logits(head, features).argmax(-1), logits(taught("ncm", features, labels), features).argmax(-1))


def test_alignment_repairs_rows_that_were_never_compared():
    """Rows of two tasks that were each trained alone, the second with much larger biases: it gets most images."""
    features, labels = data(600)
    test, truth = data(200, seed=1)
    head = head_of("aligned")
    head.samples, head.epochs = 256, 20
    means = torch.stack([features[labels == row].mean(0) for row in range(CLASSES)])
    with torch.no_grad():
        head.linear.weight.copy_(means * 0.1)
        head.linear.bias.copy_(torch.tensor([0.0] * 4 + [20.0] * 3))
    before = (logits(head, test).argmax(-1) == truth).float().mean().item()
    head.observe(features, labels)
    head.fit()
    after = (logits(head, test).argmax(-1) == truth).float().mean().item()
    assert before < 0.4 and after > before + 0.3


def test_fusion_adds_the_querys_word_to_the_prompted_heads():
    features, labels = data()
    query = features.flip(-1)
    head = make_head("fusion", Sizes(WIDTH, WIDTH), CLASSES, {"weight": 0.5}).eval()
    head.observe(features, labels, query)
    head.fit()
    lda = LDAHead(Sizes(WIDTH, WIDTH), CLASSES)
    lda.observe(query, labels)
    lda.fit()
    with torch.no_grad():
        expected = head.prompted(features).log_softmax(-1) + 0.5 * lda(query)
        torch.testing.assert_close(head(features, query), expected)
        assert torch.equal(head.train()(features, query), head.prompted(features))


# ------------------------------------------------------------------------------------------------ order, joining


@pytest.mark.parametrize("form", SOLVED)
def test_tasks_in_any_order_and_halves_joined_equal_all_at_once(form):
    features, labels = data()
    test, _ = data(50, seed=1)
    whole = taught(form, features, labels)
    ordered = head_of(form, 0)
    for row in torch.randperm(CLASSES, generator=torch.Generator().manual_seed(3)).tolist():
        if ordered.classes <= row:
            ordered.grow(row + 1, keep=ordered.classes)
        ordered.observe(features[labels == row], labels[labels == row])
        ordered.fit()
    torch.testing.assert_close(logits(ordered, test), logits(whole, test), rtol=1e-4, atol=1e-4)
    # Two heads that know the classes in other orders, and some of them both.
    order = torch.tensor([3, 1, 4, 0, 2, 6, 5])
    place = order.argsort()
    halves = taught(form, features[:120], labels[:120]), taught(form, features[120:], place[labels[120:]])
    halves[0].add(halves[1], order.tolist())
    halves[0].fit()
    torch.testing.assert_close(logits(halves[0], test), logits(whole, test), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", SOLVED)
def test_processes_add_up(form):
    features, labels = data()
    parts = [head_of(form) for _ in range(2)]
    for place, head in enumerate(parts):
        head.observe(features[place::2], labels[place::2])
    others = iter(list(parts[1].pending.tensors.values()))
    parts[0].merge_counts(lambda own: own + next(others))
    parts[0].fit()
    torch.testing.assert_close(
        logits(parts[0], features), logits(taught(form, features, labels), features), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("form", OBSERVING)
def test_going_on_from_what_was_kept_is_going_on(form):
    features, labels = data()
    first = taught(form, features[:150], labels[:150])
    buffer = io.BytesIO()
    torch.save({"head": first.state_dict(), "sums": first.going_on()}, buffer)
    kept = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    second = head_of(form)
    second.load_state_dict(kept["head"])
    second.sums_unknown()
    assert not second.has_sums
    second.go_on(kept["sums"])
    for head in (first, second):
        head.observe(features[150:], labels[150:], features[150:])
        head.fit()
    assert torch.equal(logits(first, features), logits(second, features))


def test_sums_are_not_cast_with_the_model():
    features, labels = data()
    head = taught("lda", features, labels)
    before = {name: value.clone() for name, value in head.sums.tensors.items()}
    assert head.half().weight.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in head.sums.tensors.items())
    assert copy.deepcopy(head).sums.gram.dtype == torch.float64


@pytest.mark.parametrize("form", ["ncm", "ncm-cosine", "lda-by-class", "ranpac-normalized", "aligned-class"])
def test_a_forgotten_class_leaves_no_trace(form):
    """To the bit: what is kept is what a head has that never saw the class."""
    features, labels = data()
    kept = [0, 1, 3, 4, 6]
    head = taught(form, features, labels)
    if form == "aligned-class":
        with torch.no_grad():  # its rows are trained, so they begin alike
            head.linear.weight.zero_(), head.linear.bias.zero_()
    head.keep_rows(kept)
    place = torch.full((CLASSES,), -1)
    place[kept] = torch.arange(len(kept))
    never = head_of(form, len(kept))
    if form == "aligned-class":
        with torch.no_grad():
            never.linear.weight.zero_(), never.linear.bias.zero_()
    for part in torch.arange(len(labels)).split(64):
        own = part[place[labels[part]] >= 0]
        never.observe(features[own], place[labels[own]])
    never.fit()
    for found, expected in ((head.going_on(), never.going_on()), (head.state_dict(), never.state_dict())):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("form", ["lda", "ridge", "aligned", "fusion"])
def test_sums_of_all_classes_together_cannot_forget_one(form):
    with pytest.raises(ValueError, match=r"by_class.*True.*before the first task"):
        taught(form, *data()).keep_rows([0, 1])


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svm", {}, "head is 'svm', but must be one of .*'lda'.*register_head"),
        ("lda", {"shrink": 0.1}, "head_options has 'shrink', but the head 'lda' has the options shrinkage, priors"),
        ("lda", {"shrinkage": 1.5}, "shrinkage is 1.5, but must be a number at least 0 and at most 1"),
        ("lda", {"shrinkage": -0.1}, "shrinkage is -0.1"),
        ("lda", {"shrinkage": math.nan}, "shrinkage is nan"),
        ("lda", {"shrinkage": "auto"}, "shrinkage is 'auto'"),
        ("lda", {"priors": "mine"}, "priors is 'mine', but must be one of 'equal', 'empirical'"),
        ("ridge", {"projection": 0}, "projection is 0, but must be a whole number of at least 1, or None"),
        ("ridge", {"projection": 10.5}, "projection is 10.5"),
        ("ridge", {"ridge": 0}, "ridge is 0, but must be a number above 0"),
        ("ncm", {"metric": "dot"}, "metric is 'dot'"),
        ("cosine", {"scale": -1}, "scale is -1"),
        ("aligned", {"samples": 0}, "samples is 0"),
        ("fusion", {"query": "linear"}, "query is 'linear', but must be one of 'lda', 'ncm', 'ridge'"),
        ("fusion", {"prompted": "fusion"}, "prompted is 'fusion', but must be one of .*'linear'"),
        ("fusion", {"query_options": {"shrinkage": 2}}, "shrinkage is 2"),
    ],
)  # fmt: skip
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_head(name, Sizes(WIDTH, WIDTH), 0, options)


def test_a_projection_narrower_than_the_classes():
    head = RidgeHead(Sizes(WIDTH, WIDTH), 0, projection=5)
    head.grow(5, keep=0)
    with pytest.raises(ValueError, match="projection is 5, but there are 6 classes.*for instance 2000"):
        head.grow(6, keep=5)


def test_labels_of_no_class():
    with pytest.raises(ValueError, match="labels reach from 0 to 9, but the head knows the classes 0 to 6"):
        head_of("lda").observe(torch.randn(2, WIDTH), torch.tensor([0, 9]))


def test_sums_of_another_width():
    other = ClassMeansHead(Sizes(WIDTH + 1, WIDTH + 1), CLASSES)
    with pytest.raises(ValueError, match="sums have the sizes.*another backbone"):
        head_of("ncm").go_on(other.going_on())
    with pytest.raises(ValueError, match="cannot take in the sums"):
        head_of("ncm").add(other, range(CLASSES))
    with pytest.raises(ValueError, match="cannot take in the sums"):
        taught("ranpac", *data()).add(RidgeHead(Sizes(WIDTH, WIDTH), CLASSES, projection=40, seed=1), range(CLASSES))


def test_every_head_is_tested_here():
    assert {name for name, head in HEADS.items() if head.observes and head.__module__.startswith("peft_cl")} == {
        name for name, _ in OBSERVING.values()
    }


def test_sums_survive_packing():
    features, labels = data()
    sums = Sums(CLASSES, WIDTH, by_class=True)
    sums.observe(features, labels)
    again = Sums.unpacked(sums.packed())
    assert sums.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(value, again.tensors[name]) for name, value in sums.tensors.items())
    torch.testing.assert_close(again.moment, features.double().T @ features.double())
