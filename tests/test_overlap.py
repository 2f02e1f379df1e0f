"""Scores of generated texts against several references: closed forms, computations of their own, and laws."""

from __future__ import annotations

import math
import random
import shutil
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import ConfigError
from jaxllm.evals.overlap import ALL, SCORES, overlap

for package in ("sacrebleu", "nltk", "rouge_score", "pycocoevalcap"):
    pytest.importorskip(package, reason="jaxllm[experiments] is not installed")

type Words = list[str]

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=9)
CORPUS = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=2, max_size=4)
"""(candidate, references), in words that every tokenizer leaves as they are."""


def joined(corpus: Sequence[tuple[Words, list[Words]]]) -> tuple[list[str], list[list[str]]]:
    return [" ".join(text) for text, _ in corpus], [[" ".join(text) for text in texts] for _, texts in corpus]


def grams(words: Words, order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[n : n + order]) for n in range(len(words) - order + 1))


# ------------------------------------------------------------------------------ second computations


def bleu(corpus: Sequence[tuple[Words, list[Words]]]) -> float:
    """P02-1040: clipped by the most that any one reference has; against the reference nearest in length, the shorter of two."""
    hits, all_of, length, wanted = np.zeros(4), np.zeros(4), 0, 0
    for text, references in corpus:
        length += len(text)
        wanted += min((abs(len(r) - len(text)), len(r)) for r in references)[1]
        for order in range(1, 5):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in references:
                most |= grams(reference, order)
            hits[order - 1] += (grams(text, order) & most).total()
            all_of[order - 1] += grams(text, order).total()
    return 100 * min(1.0, math.exp(1 - wanted / length)) * math.exp(np.log(hits / all_of).mean())


def nist(corpus: Sequence[tuple[Words, list[Words]]]) -> float:
    """Doddington 2002, with the reference of the highest information per n-gram for each text and order; of equals the longest."""
    everything = [reference for _, references in corpus for reference in references]
    count = {order: sum((grams(reference, order) for reference in everything), Counter()) for order in range(1, 6)}
    total, wanted, length = 0.0, 0, 0
    for order in range(1, min(5, max(len(text) for text, _ in corpus)) + 1):
        gained, num_grams = 0.0, 0
        for text, references in corpus:
            best = (-1.0, 0.0, 0)
            for reference in references:
                gain = 0.0
                for gram, times in (grams(text, order) & grams(reference, order)).items():
                    before = count[order - 1][gram[:-1]] if order > 1 else sum(map(len, everything))
                    gain += times * math.log2(before / count[order][gram])
                best = max(best, (gain / max(1, grams(text, order).total()), gain, len(reference)))
            gained, wanted, length = gained + best[1], wanted + best[2], length + len(text)
            num_grams += grams(text, order).total()
        total += gained / num_grams
    return total * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(min(1.0, length / wanted)) ** 2)


def rouge_l(corpus: Sequence[tuple[Words, list[Words]]]) -> float:
    """W04-1013 with beta 1: 2 LCS / (sum of lengths), best reference, mean."""

    def common(a: Words, b: Words) -> int:
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, word in enumerate(a):
            for j, other in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if word == other else max(table[i, j + 1], table[i + 1, j])
        return int(table[-1, -1])

    return float(np.mean([max(2 * common(text, r) / (len(text) + len(r)) for r in references) for text, references in corpus]))


def cider(corpus: Sequence[tuple[Words, list[Words]]]) -> float:
    """arXiv:1411.5726, CIDEr-D: tf-idf vectors over all n-grams, counts clipped to the reference's, a Gaussian of the lengths."""
    scores = []
    for text, references in corpus:
        total = 0.0
        for order in range(1, 5):
            names = sorted({gram for t, rs in corpus for words in (t, *rs) for gram in grams(words, order)})
            found = [sum(any(gram in grams(r, order) for r in rs) for _, rs in corpus) for gram in names]
            idf = np.array([math.log(len(corpus)) - math.log(max(1, number)) for number in found])
            vector = lambda words, names=names, order=order, idf=idf: np.array([grams(words, order)[gram] for gram in names]) * idf
            for reference in references:
                ours, theirs = vector(text), vector(reference)
                norm = np.linalg.norm(ours) * np.linalg.norm(theirs)
                lengths = grams(text, 2).total() - grams(reference, 2).total()
                total += np.minimum(ours, theirs) @ theirs / (norm or 1.0) * math.exp(-(lengths**2) / 72) / len(references)
        scores.append(10 * total / 4)
    return float(np.mean(scores))


@pytest.mark.parametrize("compute", [bleu, nist, rouge_l, cider])
def test_another_computation_gives_the_same(compute):
    @settings(max_examples=40, deadline=None)
    @given(CORPUS)
    def same(corpus: list[tuple[Words, list[Words]]]) -> None:
        name = compute.__name__
        corpus = [*corpus, (["a", "b", "c", "d"], [["b", "a", "b", "c", "d"]])]  # a 4-gram that is found: smoothing is sacrebleu's own
        assert overlap(*joined(corpus), [name])[name] == pytest.approx(compute(corpus), abs=1e-8)

    same()


# ------------------------------------------------------------------------------------- closed forms


def test_bleu_by_hand():
    """4 of 5, 3 of 4, 2 of 3, 1 of 2 n-grams, no brevity penalty: (1/5)^(1/4). Case counts, and 13a parts the full stop."""
    assert overlap(["a b c d e"], [["a b c d f", "a b c"]], ["bleu"])["bleu"] == pytest.approx(100 * 0.2**0.25)
    assert overlap(["a b c d"], [["a b c d e f"]], ["bleu"])["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert overlap(["One two three four."], [["one two three four ."]], ["bleu"])["bleu"] == pytest.approx(
        100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )


def test_nist_by_hand():
    """Four words in the references: a carries log2(4/2) = 1 bit, b log2(4/1) = 2, 'a b' log2(2/1) = 1; (3 + 1)/4 + (1 + 0)/2."""
    assert overlap(["a b", "a b"], [["a b"], ["a c"]], ["nist"])["nist"] == pytest.approx(1.5)


def test_cider_by_hand():
    """Of two texts each has its own words, so every idf is log 2, and equal texts have cosine 1 in all four orders."""
    same = [["a b c d"], ["e f g h"]]
    assert overlap(["a b c d", "e f g h"], same, ["cider"])["cider"] == pytest.approx(10)
    assert overlap(["A B, C D!", "e f - g h."], same, ["cider"])["cider"] == pytest.approx(10)  # neither case nor punctuation
    assert overlap(["a b c d", "x"], same, ["cider"])["cider"] == pytest.approx(5)


def test_texts_that_are_their_reference_and_texts_that_are_empty():
    texts = ["The Mill is a family-friendly pub.", "It's near Café Rouge, and costs £20-25."]
    best = overlap(texts, [[text, "Something else."] for text in texts])
    assert list(best) == list(ALL)
    assert best["bleu"] == 100 and best["rouge_l"] == 1 and best["nist"] > 3
    assert overlap(texts, [[text] for text in texts], ["cider"])["cider"] == pytest.approx(10)
    assert overlap(["", " "], [[text] for text in texts]) == dict.fromkeys(ALL, 0)


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program and there is no java here")
def test_meteor():
    """Texts that one of their references says, in whatever case and punctuation. (It reads its tables for half a minute.)"""
    texts = ["The cat sat on the mat.", "A pub: cheap!"]
    assert overlap(texts, [["x", "the cat sat on the mat"], ["A pub, cheap"]], ["meteor"])["meteor"] == pytest.approx(1)


def test_meteor_without_java(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="no java here; install a Java runtime, or leave 'meteor' out"):
        overlap(["a"], [["a"]], SCORES)


# --------------------------------------------------------------------------------------------- laws


@settings(max_examples=30, deadline=None)
@given(CORPUS, st.randoms(use_true_random=False))
def test_in_range_and_the_same_in_any_order(corpus: list[tuple[Words, list[Words]]], shuffler: random.Random):
    scores = overlap(*joined(corpus))
    assert 0 <= scores["bleu"] <= 100 and scores["nist"] >= 0 and 0 <= scores["rouge_l"] <= 1 and 0 <= scores["cider"] <= 10 + 1e-9
    mixed = [(text, shuffler.sample(references, len(references))) for text, references in shuffler.sample(corpus, len(corpus))]
    assert overlap(*joined(mixed)) == pytest.approx(scores)


@settings(max_examples=30, deadline=None)
@given(CORPUS)
def test_a_text_among_its_references(corpus: list[tuple[Words, list[Words]]]):
    """One among them never lowers ROUGE-L; all among them make BLEU 100 where there are 4-grams, and ROUGE-L 1."""
    before = overlap(*joined(corpus), ["rouge_l"])["rouge_l"]
    one = [(corpus[0][0], [*corpus[0][1], corpus[0][0]]), *corpus[1:]]
    assert overlap(*joined(one), ["rouge_l"])["rouge_l"] >= before - 1e-12
    every = overlap(*joined([(text, [*references, text]) for text, references in corpus]), ["bleu", "rouge_l"])
    assert every["rouge_l"] == pytest.approx(1)
    assert every["bleu"] == pytest.approx(100) or max(len(text) for text, _ in corpus) < 4


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "candidates, references, scores, message",
    [
        (["a"], [["a"], ["b"]], ALL, "1 texts and 2 lists of references"),
        ([], [], ALL, "0 texts and 0 lists"),
        (["a", "b"], [["a"], []], ALL, "the list of references 1 is empty"),
        (["a"], [["a", " "]], ALL, "the list of references 0 has an empty text"),
        (["a"], ["a"], ALL, "the list of references 0 is a text, not a list"),
        (["a"], [["a"]], ["rougel"], "no score 'rougel'; did you mean 'rouge_l'[?] scores: bleu, nist, rouge_l, cider, meteor"),
    ],
)
def test_bad_input(candidates: list[str], references: list[list[str]], scores: Sequence[str], message: str):
    with pytest.raises(ConfigError, match=message):
        overlap(candidates, references, scores)


@pytest.mark.parametrize(
    "score, module",
    [
        ("bleu", "sacrebleu"),
        ("nist", "nltk.translate.nist_score"),
        ("rouge_l", "rouge_score.rouge_scorer"),
        ("cider", "pycocoevalcap.cider.cider"),
    ],
)
def test_a_package_that_is_not_installed(score: str, module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"a score needs {module.split('.')[0]} .*pip install 'jaxllm\[experiments\]'"):
        overlap(["a"], [["a"]], [score])
