"""Prompts to token ids, with the bundle's CLIP-format tokenizer and the `tokenizers` library."""

import warnings

import numpy as np

from .errors import BundleError, PidiffError, require

MAX_CHARACTERS = 10_000


class TextTokenizer:
    """Tokenizer of a bundle: start token, words, end token, padded to the model's text length."""

    def __init__(self, bundle):
        from tokenizers import Tokenizer

        config = bundle.json("tokenizer/tokenizer_config.json")
        self.length = bundle.manifest.model.text_length
        try:
            self._tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer/tokenizer.json")))
        except Exception as e:  # the library raises plain Exception
            raise BundleError(f"tokenizer/tokenizer.json must be a tokenizers file, got: {e}") from e
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.start, self.end, self.pad = (self._special(config, f"{n}_token") for n in ("bos", "eos", "pad"))

    def encode(self, text, argument="prompt"):
        """Return int64 [1, text_length]; warns with the words that did not fit. Raises PidiffError for other than text."""
        require(isinstance(text, str), argument, "be text", type(text).__name__)
        require(len(text) <= MAX_CHARACTERS, argument, f"have at most {MAX_CHARACTERS} characters", len(text))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PidiffError(f"{argument} must be valid Unicode text, got {text!r}") from None
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = self.length - 2
        if len(encoding.ids) > room:
            lost = text[encoding.offsets[room][0]:].strip()
            warnings.warn(f"{argument} must fit {room} tokens, got {len(encoding.ids)}: ignored {lost!r}", stacklevel=2)
        ids = np.full((1, self.length), self.pad, np.int64)
        kept = [self.start, *encoding.ids[:room], self.end]
        ids[0, :len(kept)] = kept
        return ids

    def _special(self, config, key):
        """Look up a special token; older configurations write it as an object with `content`."""
        token = config.get(key) if isinstance(config, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        number = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            raise BundleError(f"tokenizer/tokenizer_config.json must name {key} from the vocabulary, got {token!r}")
        return number
