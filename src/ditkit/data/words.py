"""A word-level tokenizer for a closed set of captions, as a `PreTrainedTokenizerFast`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def word_tokenizer(captions: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the words of `captions`, most frequent first.

    Text is lower-cased, punctuation other than hyphens is dropped, words are split at white space, `</s>`
    ends each text. Ids: `<pad>` 0, `</s>` 1, `<unk>` 2.
    """
    clean = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s\-&'#*]"), " "), normalizers.Strip()]
    )
    split = pre_tokenizers.WhitespaceSplit()
    counts = Counter(
        word for caption in captions for word, _ in split.pre_tokenize_str(clean.normalize_str(caption))
    )
    words = [word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
    vocabulary = {word: index for index, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = clean  # type: ignore[assignment]
    tokenizer.pre_tokenizer = split  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=max_length,
    )


def unknown_words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The words of `text` that a tokenizer does not know."""
    encoded = tokenizer(text)
    spans = encoded.encodings[0].offsets if encoded.encodings else []
    unknown = tokenizer.unk_token_id
    return [text[a:b] for (a, b), token in zip(spans, encoded["input_ids"], strict=False) if token == unknown]
