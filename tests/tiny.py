"""Arguments of a job so small that it runs in seconds."""

TINY = {
    "image_encoder": "resnet8",
    "image_size": 32,
    "crop": 1.0,
    "text_encoder": "tfidf",
    "anchors": 3,
    "neighbours": 8,
    "k1": 4,
    "k2": 2,
    "batch_size": 12,
    "hidden": 16,
    "dim": 8,
    "queue_size": 24,
    "momentum_prototype": 0.9,
    "vanilla_epochs": 1,
    "vanilla_lr": 0.02,
    "vanilla_warmup_epochs": 0,
    "epochs": 4,
    "lr": 0.02,
    "warmup_epochs": 0,
    "frozen_encoder_epoch": 1,
    "init_proto_epoch": 1,
    "start_clean_epoch": 1,
    "finetune_epochs": 1,
    "text_weight": 0.3,
    "class_balanced": True,
    "workers": 0,
    "accelerator": "cpu",
    "seed": 0,
    "progress": False,
}
FROZEN = TINY | {"frozen_features": True, "frozen_encoder_epoch": 0}
TAGGED = {
    "image_encoder": "resnet8", "pretrained": False, "image_size": 32, "crop": 1.0, "text_encoder": "tfidf", "anchors": 3,
    "neighbours": 8, "kept_neighbours": 4, "k1": 4, "k2": 2, "batch_size": 12, "hidden": 16, "dim": 8, "queue_size": 24,
    "momentum_prototype": 0.9, "vanilla_epochs": 3, "vanilla_lr": 0.05, "vanilla_warmup_epochs": 0, "epochs": 5, "lr": 0.05,
    "warmup_epochs": 0, "frozen_encoder_epoch": 1, "init_proto_epoch": 1, "start_clean_epoch": 2, "threshold": 0.8,
    "finetune_epochs": 1, "workers": 0, "accelerator": "cpu", "seed": 0, "progress": False, "text_column": "tags",
    "clean_column": "colours,shape",
}  # fmt: skip
"""Of the job for several labels, on `tagged_parquet`."""
