"""A prior that scores two views of an object together: small, random, in pixels. It exists to show that nothing assumes a single view."""

import hashlib

import torch
from torch import nn

from dist_vsd.diffusion.process import VariancePreserving
from dist_vsd.priors.prior import Text, TextEmbeddings
from dist_vsd.priors.table import PRIORS, PriorRow

VIEWS, SIZE, PATCH, WIDTH, TIMES = 2, 8, 4, 32, 100
ROW = PriorRow(
    made_by="tests.two_views:TwoViewPrior", checked_by="tests.two_views:check", means=lambda name: name == "two-views", views_per_shot=VIEWS
)


def install():
    """Let `--prior two-views` mean it."""
    PRIORS["two_views"] = ROW


def check(_name, texts, prior_of_phi):
    """Refuse what it can't do."""
    if prior_of_phi:
        raise ValueError("the two-view prior has no other network for phi: leave --score.prior out")


class TwoViewNetwork(nn.Module):
    """Patches of both views attend to one another, and to the text; time and camera scale them."""

    adapted = {"attention": ("to_q", "to_k", "to_v", "to_out")}
    can_be_replayed, compiled = False, "off"
    time_width = WIDTH

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.time_embedding = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.camera_embedding_of_prior = nn.Linear(16, WIDTH)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.pixels = nn.ConvTranspose2d(WIDTH, 3, PATCH, PATCH)

    def forward(self, x_t, t, y, cameras=None):
        patches = self.patches(x_t)
        time = self.time_embedding(t[:, None].to(x_t) / TIMES)
        if cameras is not None:
            time = time + self.camera_embedding_of_prior(cameras.c2w.flatten(1).to(x_t))
        tokens = patches.flatten(2).transpose(1, 2) * (1 + time[:, None])
        shots = tokens.reshape(len(x_t) // VIEWS, VIEWS * tokens.shape[1], WIDTH)  # (B V, N, C) -> (B, V N, C)
        context = torch.cat([shots, y.tokens[::VIEWS].to(shots)], 1)
        attended = nn.functional.scaled_dot_product_attention(self.to_q(shots), self.to_k(context), self.to_v(context))
        tokens = (shots + self.to_out(attended)).reshape(tokens.shape)
        return x_t + 0.3 * self.pixels(tokens.transpose(1, 2).reshape(patches.shape))


class TwoViewPrior:
    """See Prior; x_0 are pictures of 8 x 8 pixels in [-1, 1]."""

    views_per_shot, image_size, latent_shape = VIEWS, SIZE, (3, SIZE, SIZE)
    knows_cameras = camera_is_guided = True

    def __init__(self, device, dtype):
        self.process = VariancePreserving(torch.linspace(0.999, 0.01, TIMES).double()).to(device)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.network = TwoViewNetwork(self.process).to(device, dtype).requires_grad_(False)
        self.device = torch.device(device)

    @staticmethod
    def load(_name, device="cpu", dtype=torch.float32):
        return TwoViewPrior(device, dtype)

    @property
    def num_bytes(self):
        return sum(p.numel() * p.element_size() for name, p in self.network.named_parameters() if "lora_" not in name)

    def encode(self, image):
        return 2 * nn.functional.interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True) - 1

    def decode(self, x_0):
        return (x_0 / 2 + 0.5).clamp(0, 1)

    def embed(self, prompts, negative_prompt=""):
        rows = [torch.randn(4, WIDTH, generator=_generator_of(text)) for text in (*prompts, negative_prompt)]
        tokens = torch.stack(rows).to(self.device)
        return TextEmbeddings(Text(tokens[:-1]), Text(tokens[-1:].expand(len(prompts), -1, -1)))

    def predict(self, x_t, t, y, cameras=None):
        return self.network(x_t, t, y, cameras)

    def network_of(self, name):
        raise ValueError(f"the two-view prior has no other network, got {name!r}")


def _generator_of(text):
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little"))
