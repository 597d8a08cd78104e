"""The protocols and their figures. Apart from their code, so that the command line needs no torch for them.

Facts alone stand here, read in the benchmarks' own code and cited where they are used; none of their code, prompts or pictures does:
neither repository has a licence (looked at: THU-LYJ-Lab/T3Bench at 6367462, 3DTopia/GPTEval3D at 2382bdd).
"""

from __future__ import annotations

T3BENCH, GPTEVAL3D = PROTOCOLS = ("t3bench", "gpteval3d")
PICTURE_SIZE = 512  # pixels a side, of both
# Of the method in the benchmarks' folders, if nobody says.
METHOD = "dist_vsd"
# Where each has its prompts.
PROMPTS_OF = {
    T3BENCH: "data/prompt_single.txt, prompt_surr.txt or prompt_multi.txt of github.com/THU-LYJ-Lab/T3Bench",
    GPTEVAL3D: "data/tournament-v0/prompts.json of github.com/3DTopia/GPTEval3D",
}
