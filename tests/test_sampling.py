"""priors/sampling.py against diffusers' own pipelines, and against a prior whose probability flow is known in closed form."""

import json
import shlex

import imageio.v3 as iio
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from dist_vsd.cli import main
from dist_vsd.diffusion.guidance import classifier_free_guidance
from dist_vsd.diffusion.process import RectifiedFlow, VariancePreserving
from dist_vsd.lab.mixtures import load_mixture
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER
from dist_vsd.priors.prior import Text, TextEmbeddings, eps_pretrain
from dist_vsd.priors.sampling import build_scheduler, sample, sample_images
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from tests.tiny_pipelines import LATENT_SIZE, build_pipeline

SCHEDULERS = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_TEXT = TextEmbeddings(Text(torch.zeros(2, 0, 0)), None)


class GaussianPrior:
    """x_0 ~ N(mean, std^2) in every coordinate, whose scores are exact."""

    mean, std = 0.7, 0.5

    def __init__(self, config=STABLE_DIFFUSION, process=None):
        self.process = process or VariancePreserving.from_scheduler_config(config)

    def predict(self, x_t, t, y, cameras=None):
        alpha_t, sigma_t = self.process.alpha_sigma(t, x_t)
        normalised = (x_t - alpha_t * self.mean) / (alpha_t**2 * self.std**2 + sigma_t**2)
        return self.process.target(self.mean + alpha_t * self.std**2 * normalised, sigma_t * normalised, t)

    def flow(self, x_t, t, last=None):
        """Return where the probability flow takes x_t: it keeps (x_t - mean_t) / std_t (Song et al. 2021, equation 13).

        To no noise, or to timestep ``last``: DDIM stops at 0, the smallest.
        """
        (mean, std), (mean_t, std_t) = self.moments(last, x_t), self.moments(t, x_t)
        return mean + std * (x_t - mean_t) / std_t

    def moments(self, t, like):
        if t is None:
            return self.mean, self.std
        alpha_t, sigma_t = self.process.alpha_sigma(torch.tensor([t]), like)
        return alpha_t * self.mean, (alpha_t**2 * self.std**2 + sigma_t**2).sqrt()


def picked(pipeline, sampler):
    pipeline.scheduler = SCHEDULERS[sampler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures_of_the_embedded_prior_are_those_of_diffusers_own_pipeline(sampler):
    pipeline = picked(DiffusionPipeline.from_pretrained(EMBEDDED_FOLDER, safety_checker=None).to(torch.float32), sampler)
    prompts, seeds = ["a green duck", "a red car, side view"], [3, 4]
    noise = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    expected = pipeline(prompts, num_inference_steps=8, guidance_scale=7.5, latents=noise, output_type="pt").images
    drawn = sample_images(StableDiffusionPrior.load("embedded"), prompts, 8, 7.5, seeds, sampler)
    # fp32 on the way: eight steps, each with guidance 7.5, enlarge what alpha_t's own rounding (1e-7) makes.
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-4)
    assert drawn.std() > 0.1


@pytest.mark.parametrize("architecture", ["sd2_v", "sdxl"])
def test_latents_of_other_architectures_are_those_of_diffusers_own_pipelines(architecture, tmp_path):
    pipeline = picked(build_pipeline(architecture, tmp_path / "words"), "ddim")
    pipeline.save_pretrained(tmp_path / "prior")
    prior = StableDiffusionPrior.load(str(tmp_path / "prior"))
    noise = torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(0))
    asked = {"prompt": ["a duck", "a car"], "num_inference_steps": 5, "guidance_scale": 3.0, "latents": noise.clone()}
    expected = pipeline(**asked, output_type="latent").images
    x_0 = sample(prior, prior.embed(asked["prompt"]), noise, 5, 3.0)
    # A random network's latents grow to some hundreds: relative to that.
    torch.testing.assert_close(x_0, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_samplers_converge_to_the_probability_flow(sampler):
    prior = GaussianPrior()
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for num_steps in (40, 80, 160):
        first = int(build_scheduler(prior.process, num_steps, sampler, "cpu").timesteps[0])
        x_0 = prior.flow(noise, first, last=0 if sampler == "ddim" else None)
        errors.append(float((sample(prior, NO_TEXT, noise, num_steps, 1.0, sampler) - x_0).abs().max()))
    # Of the first order, both: DPM-Solver++ takes its last step, from the smallest timestep to no noise, as DDIM does.
    assert errors[2] < errors[1] / 1.7 < errors[0] / 1.7**2
    assert errors[2] < 0.02


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_eulers_steps_converge_to_the_line_that_a_flow_of_a_gaussian_follows(shift):
    prior = GaussianPrior(process=RectifiedFlow(shift))
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_0 = prior.mean + prior.std * noise  # at s = 1 the process is standard normal
    errors = [float((sample(prior, NO_TEXT, noise, num_steps, 1.0) - x_0).abs().max()) for num_steps in (40, 80, 160)]
    assert errors[2] < errors[1] / 1.9 < errors[0] / 1.9**2  # of the first order
    assert errors[2] < 0.03


def test_samples_of_a_mixture_under_a_flow_are_spread_over_its_modes():
    prior = load_mixture("four_gaussians", RectifiedFlow())
    x_0 = sample(prior, prior.no_text(1000), torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)), 50, 1.0, "euler")
    shares = torch.bincount(prior.component_log_densities(x_0).argmax(-1), minlength=4) / 1000
    # Four standard deviations of a share of 1,000 independent draws are 0.06.
    torch.testing.assert_close(shares, prior.weights, rtol=0, atol=0.06)


def test_samples_of_a_gaussian_have_its_mean_and_spread():
    prior, noise = GaussianPrior(), torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    x_0 = sample(prior, NO_TEXT, noise, 100, 1.0)
    # Beside the error of 100 steps: four standard deviations of a mean and of a spread of 40,000 draws are 0.01 and 0.007.
    assert float(x_0.mean()) == pytest.approx(prior.mean, abs=0.03)
    assert float(x_0.std()) == pytest.approx(prior.std, abs=0.03)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_schedule_that_ends_in_pure_noise_can_be_sampled_at_every_number_of_steps(sampler):
    prior, noise = GaussianPrior(STABLE_DIFFUSION | {"rescale_betas_zero_snr": True}), torch.randn(2, 3)
    assert prior.process.alphas_cumprod[-1] == 0
    for num_steps in (1, 7, 499, 500, 998):
        assert sample(prior, NO_TEXT, noise, num_steps, 1.0, sampler).isfinite().all()


def test_no_gradient_is_kept_through_a_sampler():
    assert not sample(GaussianPrior(), NO_TEXT, torch.randn(2, 3, requires_grad=True), 3, 1.0).requires_grad


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ({"sampler": "euler"}, r"sampler must be ddim or dpmsolver\+\+ for a prior with this process, got 'euler'"),
        ({"num_steps": 999}, "num_steps must be between 1 and 998, got 999"),
        ({"num_steps": 0}, "num_steps must be between 1 and 998, got 0"),
        ({"guidance_scale": 2.0}, "guidance_scale 2 needs the embedding of a negative"),
    ],
)
def test_what_can_not_be_sampled_is_refused(words, rule):
    with pytest.raises(ValueError, match=rule):
        sample(GaussianPrior(), NO_TEXT, torch.randn(2, 3), **({"num_steps": 5, "guidance_scale": 1.0} | words))


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ({"sampler": "ddim"}, "sampler must be euler for a prior with this process, got 'ddim': change"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
    ],
)
def test_what_does_not_follow_a_flow_is_refused(words, rule):
    with pytest.raises(ValueError, match=rule):
        sample(GaussianPrior(process=RectifiedFlow()), NO_TEXT, torch.randn(2, 3), **({"num_steps": 5, "guidance_scale": 1.0} | words))


def test_guidance_of_what_is_predicted_is_guidance_of_eps():
    prior = load_mixture("four_gaussians", RectifiedFlow())
    y, t = TextEmbeddings(Text(torch.zeros(3, 1, 1)), Text(torch.ones(3, 1, 1))), torch.tensor([0.1, 0.6, 1.0])

    class Named:
        """The mixture, and its mirror image where the text says so."""

        process = prior.process

        def predict(self, x_t, t, y, cameras=None):
            sign = 1 - 2 * y.tokens[:, 0]
            return sign * prior.predict(sign * x_t, t)

    x_t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    guided = classifier_free_guidance(-prior.eps(-x_t, t), prior.eps(x_t, t), 7.5)
    torch.testing.assert_close(eps_pretrain(Named(), x_t, t, y, 7.5), guided, rtol=1e-5, atol=1e-5)  # fp32


def test_the_command_draws_with_either_sampler(tmp_path, capfd):
    for sampler in SCHEDULERS:
        file = tmp_path / f"{sampler}.png"
        words = ["prior", "sample", "a red car", "--num-samples", "2", "--num-steps", "3", "--enlarge", "1"]
        assert main([*words, "--sampler", sampler, "--out", str(file)]) == 0, capfd.readouterr()
        assert iio.imread(file).shape == (64, 128, 3)
    assert (tmp_path / "ddim.png").read_bytes() != (tmp_path / "dpmsolver++.png").read_bytes()


@pytest.mark.parametrize(
    ("command", "fragments"),
    [
        ('prior sample "a duck" --sampler ddmi', ("--sampler must be one of ddim, dpmsolver++, euler, got 'ddmi'", "did you mean ddim")),
        ('prior sample "a duck" --num-steps 1000', ("num_steps must be between 1 and 998, got 1000",)),
        (f'prior sample "{"a red duck, " * 5}"', ("a prompt of 20 tokens is too long, the text encoder takes 14", "would be cut off")),
    ],
)
def test_the_command_refuses_in_one_line(command, fragments, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert all(fragment in line for fragment in fragments), json.dumps([line, fragments])
    assert list(tmp_path.iterdir()) == []
