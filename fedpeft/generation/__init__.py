"""Answers that a model writes by itself: greedy, in batches, up to the end of its turn; and what they are worth."""

from __future__ import annotations

from fedpeft.generation.decoding import Limits as Limits
from fedpeft.generation.decoding import generate as generate
from fedpeft.generation.decoding import shortened as shortened
from fedpeft.generation.decoding import words_of as words_of
from fedpeft.generation.judging import Answers as Answers
from fedpeft.generation.judging import answer as answer
from fedpeft.generation.judging import drawn_rows as drawn_rows
from fedpeft.generation.judging import judge as judge
from fedpeft.generation.judging import parts_of as parts_of
from fedpeft.generation.judging import with_answers as with_answers
from fedpeft.generation.prompts import prompt_tokens as prompt_tokens
from fedpeft.generation.prompts import text_tokens as text_tokens
