"""How a text that a model wrote is judged against the reference: one number or a few for each pair, which metrics sum.

All functions take the answers and the references, ``n`` texts each, and return an array ``(n, k)`` of float64.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Marks = NDArray[np.float64]

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, without punctuation, English articles and spare white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answers: Sequence[str], references: Sequence[str]) -> Marks:
    """Return 1 where both texts are the same once they are `normalised`, else 0.

    A text of punctuation alone, of which nothing is left, is compared as it stands.
    """
    return _column([float(_comparable(a, b)) for a, b in zip(answers, references, strict=True)])


def _comparable(answer: str, reference: str) -> bool:
    one, other = normalised(answer), normalised(reference)
    return one == other if other else " ".join(answer.split()) == " ".join(reference.split())


def token_f1(answers: Sequence[str], references: Sequence[str]) -> Marks:
    """Return the harmonic mean of precision and recall of the words of `normalised` texts, as SQuAD does.

    1 where neither has a word, 0 where one of them has none.
    """

    def f1(answer: str, reference: str) -> float:
        said, right = normalised(answer).split(), normalised(reference).split()
        if not said or not right:
            return float(said == right)
        return 2 * sum((Counter(said) & Counter(right)).values()) / (len(said) + len(right))

    return _column([f1(a, b) for a, b in zip(answers, references, strict=True)])


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> Marks:
    """Return ROUGE-L's F-measure by the package rouge-score: of the longest common subsequence of words, no stemmer.

    Its words are of the letters a to z and of digits; texts in other alphabets have none, and score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return _column([scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(answers, references, strict=True)])


def bleu_parts(answers: Sequence[str], references: Sequence[str]) -> Marks:
    """Return what BLEU sums over a corpus, by the package sacrebleu with its defaults (tokens 13a, case counts).

    Ten numbers a row: n-grams that match and n-grams there are, each for n = 1 to 4, and both lengths.
    """
    import numpy as np
    from sacrebleu.metrics import BLEU

    scorer = BLEU(effective_order=True)  # of a sentence, whose own score is not used
    found = [scorer.sentence_score(a, [b]) for a, b in zip(answers, references, strict=True)]
    rows = [[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in found]
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), 10)


def bleu_of(parts: Marks) -> float:
    """Return BLEU of a corpus, 0 to 100, from the parts of its rows."""
    from sacrebleu.metrics import BLEU

    total = [int(each) for each in parts.sum(axis=0)]
    return float(BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], effective_order=False).score)


LETTER = re.compile(r"[(\[*_]*([A-Z])(?:[)\].:,*_]|\s|$)")
ANSWER_IS = re.compile(r"\b(?i:answer(?:\s+is)?)\s*:?\s*[(\[*_]*([A-Z])(?:[)\].:,*_]|\s|$)")


def choice_accuracy(answers: Sequence[str], references: Sequence[str]) -> Marks:
    """Return 1 where an answer makes the reference's choice, else 0.

    Where the reference begins with a letter of an option, as ``B``, ``(B)`` and ``B. Paris`` do, the answer's first
    letter counts, or the one after "answer is". Elsewhere, as where options are words such as ``positive``, the answer
    must begin with all of the reference, once both are `normalised`.
    """
    return _column([float(_chooses(a, b)) for a, b in zip(answers, references, strict=True)])


def _chooses(answer: str, reference: str) -> bool:
    right = _letter(reference)
    if right is not None:
        said = ANSWER_IS.search(answer)
        return (said[1] if said is not None else _letter(answer)) == right
    one, other = normalised(answer), normalised(reference)
    return f"{one} ".startswith(f"{other} ") if other else answer.strip() == reference.strip()


def _letter(text: str) -> str | None:
    """Return the letter of an option that a text begins with; "A dog" begins with an article."""
    stripped = text.strip()
    found = LETTER.match(stripped)
    if found is None or (len(stripped) > 1 and stripped[:2] in ("A ", "I ")):
        return None
    return found[1]


def same(answers: Sequence[str], references: Sequence[str]) -> Marks:
    """Return 1 where an answer is the reference, letter for letter, else 0."""
    return _column([float(a == b) for a, b in zip(answers, references, strict=True)])


def passes(answers: Sequence[str], references: Sequence[str]) -> Marks:
    """Return 1 where the code of an answer passes its tests, which are the reference, else 0 (pass@1)."""
    from fedpeft.tasks.code import passes as run

    return _column([float(run(a, b)) for a, b in zip(answers, references, strict=True)])


def _column(values: Sequence[float]) -> Marks:
    import numpy as np

    return np.asarray(values, dtype=np.float64).reshape(len(values), 1)
