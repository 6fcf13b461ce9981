"""A language of forty words: a teacher, a student, a generator and rows, all of them random and quick."""
import argparse

import torch
import transformers
from datasets import Dataset

from kdbook.words import MaskedGenerator

WORDS = 40
TOKENIZER = argparse.Namespace(all_special_ids=[0, 1, 2, 3], mask_token_id=3, pad_token_id=0)  # pad, begin, end, mask


def bert(width=16, layers=1, seed=0, kind=transformers.BertForSequenceClassification, dropout=0.):
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=2 * width,
                                     max_position_embeddings=16, num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0)
    model = kind(config).eval()
    model.tokenizer = TOKENIZER
    return model


def generator(seed=0, vocabulary=None):
    return MaskedGenerator(bert(seed=seed, kind=transformers.BertForMaskedLM), TOKENIZER, vocabulary).eval()


def rows(n=48, seed=0, length=8):
    "Rows that begin with 1 and end with 2, of four to `length` words, with labels and a teacher's logits."
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length + 1, (n,), generator=g).tolist()
    ids = [[1, *torch.randint(4, WORDS, (k - 2,), generator=g).tolist(), 2] for k in lengths]
    return Dataset.from_dict(dict(idx=list(range(n)), input_ids=ids, label=torch.randint(0, 2, (n,), generator=g).tolist(),
                                  teacher_logits=torch.randn(n, 2, generator=g).tolist()))
