"""Pretrain an encoder in a loop of your own: views and loss from Contralto, everything else plain PyTorch.

    python examples/own_loop.py [FOLDER_OF_IMAGES] [STEPS]

Without a folder it takes the little pictures that ship with the package.
"""

import sys
from importlib import resources

import torch

from contralto.data.canvas import CanvasDataset, as_it_is
from contralto.data.dataset import EpochSampler
from contralto.data.ingest import ingest
from contralto.encoders.heads import mlp
from contralto.encoders.image import image_encoder
from contralto.losses.pairs import nt_xent
from contralto.views.batched import draw_batch
from contralto.views.presets import simclr_pair

data = (
    sys.argv[1] if len(sys.argv) > 1 else str(resources.files("contralto.data") / "samples/web_icons/web_icons.parquet")
)
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
device = "cuda" if torch.cuda.is_available() else "cpu"

manifest = ingest(data, unlabelled=True)  # broken files are left out, and listed in manifest.skipped
pictures = CanvasDataset(manifest.read_bytes, {}, count=len(manifest), side=48)
sampler = EpochSampler(len(pictures), seed=0)
loader = torch.utils.data.DataLoader(
    pictures, batch_size=min(128, len(pictures)), sampler=sampler, collate_fn=as_it_is, drop_last=True
)

encoder = image_encoder("resnet8", size=32).to(device)
projector = mlp([encoder.num_features, 256, 64], norm="batch").to(device)
optimizer = torch.optim.AdamW([*encoder.parameters(), *projector.parameters()], lr=1e-3)
views = simclr_pair(32, mean=encoder.mean, std=encoder.std)

step = epoch = 0
while step < steps:
    sampler.set_epoch(epoch)
    for batch in loader:
        pixels, _ = draw_batch(
            views, batch["pictures"].to(device), batch["sizes"], seed=0, epoch=batch["epoch"], index=batch["index"]
        )
        z0, z1 = projector(encoder(torch.cat(pixels))).chunk(2)
        loss = nt_xent(z0, z1, temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 20 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}")
        if step == steps:
            break
    epoch += 1
