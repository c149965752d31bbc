"""Text towers of both HunyuanVideo in a tiny size, so that their pipelines read prompts."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as Several
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
)

from .builders import T5_SIZE, TEXT_DIM, WORDS, hunyuan, hunyuan_1_5, tokenizer

_MARKS = ("<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_TEXT: dict[str, Any] = {
    "hidden_size": TEXT_DIM,
    "intermediate_size": 16,
    "num_hidden_layers": 3,  # the last two of which are not read
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": len(WORDS) + len(_MARKS),
}


def marked_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """Read the words, and the marks of the template, each as one token."""
    known = {word: index for index, word in enumerate([*WORDS, *_MARKS])}
    model = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    marks = [Split(mark, "isolated") for mark in _MARKS]
    model.pre_tokenizer = Several([*marks, WhitespaceSplit()])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="[PAD]",
        unk_token="[UNK]",
        additional_special_tokens=list(_MARKS),
        model_max_length=length,
    )


def hunyuan_with_text() -> Any:
    pipeline = hunyuan()
    words = marked_tokenizer(512)
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            image_size=336, patch_size=14,
        ),
        text_config=LlamaConfig(**_TEXT, pad_token_id=0),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )  # fmt: skip
    clip = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=len(WORDS), max_position_embeddings=77, eos_token_id=2,
    )  # fmt: skip
    pipeline.register_modules(
        text_encoder=LlavaForConditionalGeneration(llava).eval(),
        tokenizer=words,
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=tokenizer(),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
    )
    return pipeline


def hunyuan_1_5_with_text() -> Any:
    pipeline = hunyuan_1_5()
    words = marked_tokenizer(512)
    # As many tokens as the pipeline cuts off, and the prompt.
    words.chat_template = "{{ 'a ' * 108 }}{{ messages[-1]['content'] }}"
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    qwen = Qwen2_5_VLTextConfig(**_TEXT, rope_parameters=rope, pad_token_id=0)
    pipeline.register_modules(
        text_encoder=Qwen2_5_VLTextModel(qwen).eval(),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(T5Config(**T5_SIZE)).eval(),
        tokenizer_2=tokenizer(),
    )
    return pipeline
