import logging
from collections import Counter
from contextlib import contextmanager

import pyarrow as pa
import pytest

from mmm4rec_cli.data.tables import write_tables
from mmm4rec_cli.workspace import Workspace


class Listener:
    """A reporter that keeps what it hears."""

    def __init__(self):
        self.notes, self.warnings, self.done = [], [], Counter()

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)

    @contextmanager
    def stage(self, name, total=None, unit=""):
        listener, self.done[name] = self, 0

        class Progress:
            def advance(self, n=1, status=""):
                listener.done[name] += n

        yield Progress()
        if total is not None:
            assert self.done[name] == total, f"stage {name} ended at {self.done[name]} of {total}"


@pytest.fixture
def reporter():
    return Listener()


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def write_domain(workspace):
    """Write a domain of items given as raw id -> (text, image, image address); one user has taken each once."""

    def write(items, domain="shop"):
        n = len(items)
        raw = sorted(items)
        interactions = pa.table({"user_id": [0] * n, "item_id": list(range(1, n + 1)), "timestamp": list(range(n))})
        table = pa.table(
            {
                "item_id": list(range(1, n + 1)),
                "raw_item_id": raw,
                "title": pa.nulls(n, pa.string()),
                "text": pa.array([items[one][0] for one in raw], pa.string()),
                "image": pa.array([items[one][1] for one in raw], pa.string()),
                "image_url": pa.array([(*items[one], None)[2] for one in raw], pa.string()),
                "n_interactions": [1] * n,
            }
        )
        users = pa.table({"user_id": [0], "raw_user_id": ["ann"], "n_interactions": [n]})
        return write_tables(workspace, domain, interactions=interactions, items=table, users=users, manifest={})

    return write


CORPUS = [
    "red cotton scarf for winter",
    "wireless mouse with usb receiver",
    "a book about cats and dogs",
    "blue ceramic mug, dishwasher safe",
]
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEING = {**TINY, "image_size": 32, "patch_size": 8}
SIZE = {"height": 32, "width": 32}


def build_siglip(folder):
    import sentencepiece
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipTokenizer

    # the published vocabulary's layout: </s> is 1 and serves as padding too
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"))
    text = {**TINY, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64}
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    SiglipModel(SiglipConfig(text_config={**text, **ids}, vision_config=SEEING)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size=SIZE).save_pretrained(folder)


def build_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    ids = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**TINY, "vocab_size": len(words), "max_position_embeddings": 77, **ids}
    CLIPModel(CLIPConfig(text_config=text, vision_config=SEEING, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE).save_pretrained(folder)


def build_bert(folder, **options):
    from transformers import BertConfig, BertModel

    config = BertConfig(**TINY, vocab_size=bert_words(folder), max_position_embeddings=32)
    BertModel(config, **options).save_pretrained(folder)


def build_vit(folder, **options):
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    ViTModel(ViTConfig(**SEEING), **options).save_pretrained(folder)
    ViTImageProcessorPil(size=SIZE).save_pretrained(folder)


def build_resnet(folder):
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetModel

    ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder)


def build_siglip2(folder):
    """The model of SigLIP 2 that takes pictures of any shape, with a tokenizer of Gemma's kind."""
    from transformers import GemmaTokenizer, Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *sorted({letter for line in CORPUS for letter in line})]
    tokenizer = GemmaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    text = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 64, **ids}
    seeing = {**TINY, "patch_size": 8, "num_patches": 16}
    Siglip2Model(Siglip2Config(text_config=text, vision_config=seeing)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(folder)


def bert_words(folder):
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for line in CORPUS for word in line.split()})]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return len(words)


def build_blip(folder, kind="BlipForImageTextRetrieval"):
    import transformers

    text = {**TINY, "vocab_size": bert_words(folder), "max_position_embeddings": 32, "encoder_hidden_size": 16}
    ids = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config={**text, **ids}, vision_config=SEEING, projection_dim=12, image_text_hidden_size=10
    )
    getattr(transformers, kind)(config).save_pretrained(folder)
    transformers.BlipImageProcessorPil(size=SIZE).save_pretrained(folder)


def build_blip2(folder):
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, BlipImageProcessorPil

    qformer = {**TINY, "vocab_size": bert_words(folder), "max_position_embeddings": 32, "encoder_hidden_size": 16}
    config = Blip2Config(
        vision_config=SEEING,
        qformer_config={**qformer, "use_qformer_text_input": True, "cross_attention_frequency": 1},
        text_config={**TINY, "model_type": "opt", "vocab_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16},
        num_query_tokens=4,
        image_text_hidden_size=14,
    )
    Blip2ForImageTextRetrieval(config).save_pretrained(folder)
    BlipImageProcessorPil(size=SIZE).save_pretrained(folder)


def build_roberta(folder):
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    letters = sorted({letter for line in CORPUS for letter in line.replace(" ", "Ġ")})
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters]
    tokenizer = RobertaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    config = RobertaConfig(**TINY, vocab_size=len(words), max_position_embeddings=66, type_vocab_size=1)
    # the published checkpoint is a masked language model's, which has no pooler
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


BUILDERS = {
    "siglip2": build_siglip2,
    "blip": build_blip,
    "blip-joint": lambda folder: build_blip(folder, "BlipModel"),
    "blip2": build_blip2,
    "roberta": build_roberta,
    "siglip": build_siglip,
    "clip": build_clip,
    "bert": build_bert,
    "bert-no-pooler": lambda folder: build_bert(folder, add_pooling_layer=False),
    "vit": build_vit,
    "vit-no-pooler": lambda folder: build_vit(folder, add_pooling_layer=False),
    "resnet": build_resnet,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Build a tiny random model of a kind and give its folder, written as save_pretrained does."""
    root = tmp_path_factory.mktemp("models")

    def build(kind, seed=1, name=None):
        import torch
        from transformers.utils import logging as library

        folder = root / (name or f"{kind}-{seed}")
        if not folder.exists():
            folder.mkdir()
            library.set_verbosity(logging.CRITICAL)
            library.disable_progress_bar()
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                BUILDERS[kind](folder)
        return str(folder)

    return build
