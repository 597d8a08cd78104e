"""ONE update of all particles and of phi, in the order of ProlificDreamer's Algorithm 1. Read this file first.

Algorithm 1 steps one particle and then phi; here every particle takes its step, and phi then learns from the renders of
all of them, on all ranks, as one batch. Each random draw is keyed by (seed, particle, shot, update, purpose).

Which renders are made when is told in work.py, the objectives' formulas in objectives/, the steps in theta_step.py and phi/step.py.
"""

from __future__ import annotations

import torch

from dist_vsd.objectives.objective import Batch
from dist_vsd.stopwatch import Stopwatch
from dist_vsd.training.draws import Draws
from dist_vsd.training.encoded_renders import EncodedRenders, add_drawn_noise, encode, in_micro_batches, pose_for_phi, render
from dist_vsd.training.phi.step import PhiStep, join_passes, update_phi
from dist_vsd.training.report import Report
from dist_vsd.training.state import TrainingState
from dist_vsd.training.theta_step import ThetaStep, draw_particles
from dist_vsd.training.work import Work


def update(state: TrainingState, index: int, measure: bool = False) -> Report:
    """Advance the chosen particles of this rank by one Adam step each, and phi by its steps (collective).

    Args:
        state: changed in place.
        index: of the update, from 0.
        measure: whether to mark when a GPU comes to the end of each stage.
    """
    config, prior, phi, objective = state.config, state.prior, state.phi, state.objective
    stopwatch = Stopwatch(prior.device, measure)
    report = Report(stopwatch)
    if objective.draws_particles:
        draw_particles(state, index, stopwatch)
        return report
    work, theta_step = Work(state, index), ThetaStep(state, index, report)
    with stopwatch.stage("render"):
        draws = Draws(state, work, index)  # of cameras, t, eps and all else
    shared_pass = PhiStep.shared_with_theta(state, work)  # phi's training pass, where it serves as its score too; else None
    encoded: list[EncodedRenders] = []
    for batch in work.micro_batches():
        shots = batch.shots
        with stopwatch.stage("render"), torch.set_grad_enabled(batch.takes_step):
            c = draws.cameras(shots)
            renders = render(config, batch, draws)  # image = g(theta, c)
            x_0 = encode(config, prior, renders) if objective.asks_prior else None
        if x_0 is not None:
            encoded.append(EncodedRenders.of(shots, x_0, pose_for_phi(config, c), c if prior.knows_cameras else None))
        if not batch.takes_step:
            continue
        with stopwatch.stage("scores"):
            noised = add_drawn_noise(state, shots, c, x_0, draws) if x_0 is not None else None  # x_t = alpha_t x_0 + sigma_t eps
            if noised is not None and shared_pass is not None:
                noised = shared_pass.learn_at(encoded[-1], noised)
            drawn = [draws.of_objective(shot) for shot in shots]
            cotangents = objective.cotangents(Batch(renders, c, state.stage.progress(index), drawn, noised))
            report.add(cotangents, renders, prior.process.fraction(noised.t) if noised is not None else None)
        with stopwatch.stage("backward"):
            theta_step.backward(batch, cotangents, renders, x_0)
            for particle in batch.finished:
                theta_step.take(particle)  # theta <- Adam
        del renders, x_0, noised, cotangents  # the next micro-batch takes their room
    if phi is not None:
        with stopwatch.stage("scores"):
            join_passes(state, work, shared_pass, draws)
        with stopwatch.stage("phi"):
            if shared_pass is not None:
                shared_pass.take(state, work, index, report)
            else:
                batches = in_micro_batches(encoded, work.chosen.phi, state.micro_batch_size)
                for step in range(config.score.steps_per_update):
                    update_phi(state, work, batches, draws, index, step, report)  # phi <- AdamW on its denoising loss
    with stopwatch.stage("backward"):
        theta_step.finish()  # a step whose sum was on its way over the ranks that share the particle
    return report
