"""How much generated texts overlap with several references each: BLEU, NIST, ROUGE-L, CIDEr, METEOR, over a corpus.

Every score is a kept implementation's: sacrebleu (13a), nltk, rouge-score, pycocoevalcap; imported where one is asked for:
`pip install 'jaxllm[experiments]'`. Texts are plain, not tokenised. What each does with them:

    bleu     0 to 100  sacrebleu's corpus BLEU, 13a tokens, with case
    nist     0 and up  nltk's corpus NIST up to 5-grams, on the same tokens. Of several references it takes the best one for each
                       text and order where the mteval script takes all together: a little lower than published numbers
    rouge_l  0 to 1    rouge-score's F of the longest common subsequence, best reference, mean over texts; lower case
    cider    0 to 10   pycocoevalcap's CIDEr-D, on the same tokens in lower case, without those that are punctuation
    meteor   0 to 1    METEOR 1.5, the program that pycocoevalcap carries, on CIDEr's tokens, from counts summed over the corpus; it
                       needs Java, a gigabyte or two of memory and up to half a minute to start, so it is computed only if asked
                       for: it is not in ALL

Sources: BLEU P02-1040; NIST Doddington 2002; ROUGE W04-1013; CIDEr arXiv:1411.5726; METEOR W14-3348; scores reported together for
table to text in arXiv:1706.09254. Papers print ROUGE-L and METEOR times 100.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.config import ConfigError, nearest

ALL = ("bleu", "nist", "rouge_l", "cider")
SCORES = (*ALL, "meteor")

_NIST_ORDER = 5

type Texts = Sequence[str]


def overlap(candidates: Texts, references: Sequence[Texts], scores: Sequence[str] = ALL) -> dict[str, float]:
    """Corpus scores of texts against their references, by name.

    Args:
      candidates: one text for each table, question or the like; may be empty strings.
      references: at least one text for each candidate; their number may differ.
      scores: some of `SCORES`.

    Raises:
      ConfigError: lengths that differ, no texts, a candidate without references, an empty reference, an unknown score, a package
        or program that is not installed.

    >>> overlap(["The Mill is a pub."], [["The Mill is a pub.", "A pub is called The Mill."]], ["bleu", "rouge_l"])
    {'bleu': 100.0, 'rouge_l': 1.0}
    """
    unknown = next((name for name in scores if name not in SCORES), None)
    if unknown is not None:
        raise ConfigError(f"no score '{unknown}'{nearest(unknown, SCORES) or ';'} scores: {', '.join(SCORES)}")
    if not candidates or len(candidates) != len(references):
        raise ConfigError(f"{len(candidates)} texts and {len(references)} lists of references; there must be one list for each text")
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts or not all(text.strip() for text in texts):
            what = "is a text, not a list" if isinstance(texts, str) else "has an empty text" if texts else "is empty"
            raise ConfigError(f"the list of references {index} {what}; give at least one text for each candidate")
    compute: dict[str, Callable[[Texts, Sequence[Texts]], float]] = {
        "bleu": _bleu, "nist": _nist, "rouge_l": _rouge_l, "cider": _cider, "meteor": _meteor,
    }  # fmt: skip
    return {name: float(compute[name](candidates, references)) for name in scores}


def _bleu(candidates: Texts, references: Sequence[Texts]) -> float:
    most = max(map(len, references))
    streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
    bleu = _module("sacrebleu").BLEU(tokenize="13a", force=True)
    return round(bleu.corpus_score(list(candidates), streams).score, 10)  # 100, not 100.00000000000004


def _nist(candidates: Texts, references: Sequence[Texts]) -> float:
    split = _splitter()
    words = [split(text) for text in candidates]
    order = min(_NIST_ORDER, max(map(len, words)))  # an order of which no candidate has an n-gram adds 0; nltk divides by 0
    if order == 0:
        return 0.0
    return _module("nltk.translate.nist_score").corpus_nist([[split(text) for text in texts] for texts in references], words, n=order)


def _rouge_l(candidates: Texts, references: Sequence[Texts]) -> float:
    scorer = _module("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    best = [scorer.score_multi(list(texts), text)["rougeL"].fmeasure for text, texts in zip(candidates, references, strict=True)]
    return sum(best) / len(best)


def _cider(candidates: Texts, references: Sequence[Texts]) -> float:
    score, _ = _module("pycocoevalcap.cider.cider").Cider().compute_score(*_captions(candidates, references))
    return score


def _meteor(candidates: Texts, references: Sequence[Texts]) -> float:
    if shutil.which("java") is None:
        raise ConfigError("METEOR is a Java program and there is no java here; install a Java runtime, or leave 'meteor' out of the scores")
    score, _ = _module("pycocoevalcap.meteor.meteor").Meteor().compute_score(*_captions(candidates, references))
    return score


def _captions(candidates: Texts, references: Sequence[Texts]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """(references, candidates) as pycocoevalcap takes them: by number, words split by spaces, lower case, no punctuation."""
    split = _splitter()
    plain = lambda text: " ".join(word for word in split(text.lower()) if any(character.isalnum() for character in word))
    return {n: [plain(t) for t in texts] for n, texts in enumerate(references)}, {n: [plain(text)] for n, text in enumerate(candidates)}


def _splitter() -> Callable[[str], list[str]]:
    """A text's 13a tokens."""
    tokenizer = _module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    return lambda text: tokenizer(text).split()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"a score needs {name.split('.')[0]} ({error}); pip install 'jaxllm[experiments]'") from None
