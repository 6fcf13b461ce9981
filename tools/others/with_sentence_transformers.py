import sys

import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import CrossEntropyLoss

train, validation = (Dataset.from_csv(path) for path in sys.argv[2:4])
big, small = (CrossEncoder(sys.argv[1], max_length=64) for _ in range(2))
small.model.bert.encoder.layer = small.model.bert.encoder.layer[:3]
small.model.config.num_hidden_layers = 3
pairs = lambda texts: [(text, "") for text in texts]


class DistillationLoss(CrossEntropyLoss):
    def forward(self, inputs, labels, **others):
        texts, teacher_logits = inputs
        logits = self.model(self.model.preprocess(pairs(texts)))["scores"]
        goal = (torch.tensor(teacher_logits) / 2).softmax(-1)
        soft = self.ce_loss(logits / 2, goal)
        return 0.5 * 4 * soft + 0.5 * self.ce_loss(logits, labels)


told = big.predict(pairs(train["text"])).tolist()
trainer = CrossEncoderTrainer(
    small,
    CrossEncoderTrainingArguments(
        "out",
        num_train_epochs=6,
        learning_rate=2e-4,
        per_device_train_batch_size=32,
        report_to="none",
    ),
    train.add_column("teacher_logits", told),
    loss=DistillationLoss(small),
)
trainer.train()
answers = small.predict(pairs(validation["text"])).argmax(-1)
print((answers == validation["label"]).mean())
