"""Decoding ids one after another, for tokenizers in which the text of an id depends on its neighbours."""

from collections.abc import Callable, Iterable, Sequence

from .tokenizers import StreamDecoder

_LONGEST_CHARACTER = 8  # tokens
_INCOMPLETE = "\ufffd"


class WindowDecoder(StreamDecoder):
    """Decodes the last few ids again for each new one, and returns the text that the new one adds.

    Args:
        decode: returns the text of ids.
        prompt: ids whose text is known already.
        byte_ids: ids that stand for one byte each. The library decodes neighbours among them together, and
            one wrong byte turns all of them into replacement characters. So they are held back until an
            id of another kind follows.
    """

    def __init__(
        self,
        decode: Callable[[Iterable[int]], str],
        prompt: Sequence[int] = (),
        byte_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decode, self._byte_ids = decode, byte_ids
        self._ids = [int(i) for i in prompt]
        self._shown = len(self._ids)  # the text of ids[:_shown] is known

    def push(self, token: int) -> str:
        self._ids.append(int(token))
        if token in self._byte_ids:
            return ""
        text = self._rest()
        if not text or (
            text.endswith(_INCOMPLETE) and len(self._ids) - self._shown < _LONGEST_CHARACTER
        ):
            return ""
        # the ids shown last stay as the context of the next
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def finish(self) -> str:
        return self._rest()

    def _rest(self) -> str:
        before, text = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if text.startswith(before):
            return text[len(before) :]
        # the new ids change the end of the known text: return the text after the part that stays
        same = next(i for i, c in enumerate(before) if text[i : i + 1] != c)
        return text[same:]
