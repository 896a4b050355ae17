"""What ends an answer before its last token: texts, wherever they lie between tokens, and special tokens.

Megatron compares the last tokens with those of the stop string alone, which a tokenizer need not choose in
a text. Here the text of the tokens is searched: on every rank as they come, so that the engine ends a
request in the same step everywhere (`end_at_stop_texts`), and once more in the whole answer, which ends
before the first stop (`Stops.cut`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helix_megatron.generate.prompts import TextStream

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Stops:
    """What ends an answer.

    Args:
        texts: none of them empty.
        tokens: special ones, which an answer's text does not show.
    """

    texts: tuple[str, ...]
    tokens: frozenset[int] = frozenset()

    @classmethod
    def of(cls, words: list[str], tokenizer: Any) -> Stops:
        """Of the `stop` of a request; a word that is a special token's name means that token."""
        texts, tokens = [], set()
        for word in words:
            ids = tokenizer.tokenize(word)
            if len(ids) > 1 and ids[0] == tokenizer.bos:  # that a text begins with; alone, it is the word
                ids = ids[1:]
            if len(ids) == 1 and not decoder(tokenizer)(ids):
                tokens.add(ids[0])
            else:
                texts.append(word)
        return cls(tuple(texts), frozenset(tokens))

    def first(self, text: str) -> int | None:
        """Where the first stop text in `text` begins; None without one."""
        return min((place for place in map(text.find, self.texts) if place >= 0), default=None)

    def cut(self, tokens: list[int], decode: Decode) -> tuple[int, str] | None:
        """How many of these tokens come before the first stop, and their text up to it; None without a stop.

        A token that has a character before the stop text and others in it is one of them.
        """
        before = next((place for place, token in enumerate(tokens) if token in self.tokens), len(tokens))
        text = decode(tokens[:before])
        end = self.first(text)
        if end is None:
            return (before, text) if before < len(tokens) else None
        low, high = 0, before
        while low < high:  # the fewest tokens that write text[:end]
            middle = (low + high) // 2
            low, high = (low, middle) if decode(tokens[:middle])[:end] == text[:end] else (middle + 1, high)
        return low, text[:end]


class StopSearch:
    """Looks for the first stop while the tokens of an answer come."""

    def __init__(self, stops: Stops, decode: Decode):
        self._stops, self._stream = stops, TextStream(decode)
        self._tail, self._seen, self._found = "", 0, False
        self._keep = max(map(len, stops.texts), default=1) - 1

    def found(self, tokens: list[int]) -> bool:
        """Whether there is a stop in these tokens, the first of which an earlier call has seen."""
        while not self._found and self._seen < len(tokens):
            token = tokens[self._seen]
            self._seen += 1
            self._tail += self._stream.push(token)
            self._found = token in self._stops.tokens or self._stops.first(self._tail) is not None
            self._tail = self._tail[max(0, len(self._tail) - self._keep) :]
        return self._found


def decoder(tokenizer: Any) -> Decode:
    """The text of tokens, as the server's answers have it."""
    return lambda tokens: tokenizer.detokenize(tokens, skip_special_tokens=True)


def end_at_stop_texts(engine: Any, tokenizer: Any) -> None:
    """Let a dynamic engine end a request at the `stop_words` of its SamplingParams, as `Search` finds them.

    No token is taken away: whoever reads the answer cuts it. Ranks ask nobody, their tokens are the same.
    """
    from helix_megatron.generate.engine import generated_tokens

    searches: dict[int, StopSearch] = {}
    before = engine._check_stop_words_for_request_post_append

    def stopped(request: Any) -> tuple[bool, int]:
        number, words = request.request_id, request.sampling_params.stop_words
        request.stop_word_ids = None  # Megatron's own search has nothing to do
        if not words:
            return before(request)
        if number not in searches:
            for ended in set(searches) - set(engine.requests):
                del searches[ended]
            searches[number] = StopSearch(Stops.of(words, tokenizer), decoder(tokenizer))
        record = engine.requests[number].record
        one = len(record.requests) == 1  # it was never evicted
        if searches[number].found(request.generated_tokens if one else generated_tokens(record)):
            return True, 0
        return before(request)

    engine._check_stop_words_for_request_post_append = stopped
