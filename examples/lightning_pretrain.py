"""Give a system of Contralto to a Trainer of your own, with the probes that watch it.

    python examples/lightning_pretrain.py [FOLDER_OF_IMAGES] [EPOCHS]

Without a folder it takes the little pictures that ship with the package; their labels are only looked at.
"""

import sys
from importlib import resources

import torch
from lightning import Trainer

from contralto.data.canvas import CanvasDataset, as_it_is
from contralto.data.dataset import EpochSampler
from contralto.data.ingest import ingest
from contralto.encoders.image import image_encoder
from contralto.systems.selfsup.simclr import SimCLR
from contralto.training.probes import OnlineKNN, OnlineProbe

data = (
    sys.argv[1] if len(sys.argv) > 1 else str(resources.files("contralto.data") / "samples/web_icons/web_icons.parquet")
)
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 2

manifest = ingest(data, unlabelled=True)
labels = torch.from_numpy(manifest.labels.astype("int64"))  # -1 where there is none
pictures = CanvasDataset(manifest.read_bytes, {"label": labels}, side=48)
size = min(128, len(pictures))
loader = torch.utils.data.DataLoader(
    pictures, batch_size=size, sampler=EpochSampler(len(pictures), seed=0), collate_fn=as_it_is, drop_last=True
)

encoder = image_encoder("resnet8", size=32)
system = SimCLR(  # draws its views of every batch by itself, on the device that trains
    encoder, num_features=encoder.num_features, steps_per_epoch=len(loader), epochs=epochs, batch_size=size, hidden=256, dim=64,
    optimizer="adamw", lr=1e-3, warmup_epochs=0, temperature=0.2,
)  # fmt: skip
probes = [OnlineProbe(encoder.num_features, len(manifest.classes)), OnlineKNN()] if manifest.classes else []
trainer = Trainer(
    max_epochs=epochs, callbacks=probes, logger=False, enable_checkpointing=False, use_distributed_sampler=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(system, loader)
print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
