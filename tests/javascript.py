"""Two npm packages that judge GLB files: the Khronos validator, run by node, and three.js, run in a browser (browser.py)."""

import base64
import functools
import json
import shutil
import subprocess

import imageio.v3 as iio
import numpy as np
import torch

from dist_vsd.export.glb import TO_GLTF
from tests.browser import WEBGL, start_chromium

PACKAGES = ("gltf-validator@2.0.0-dev.3.10", "three@0.187.0")
VALIDATE = """
const validator = require("gltf-validator");
validator.validateBytes(new Uint8Array(require("fs").readFileSync(process.argv[1]))).then((report) => console.log(JSON.stringify(report)));
"""
PAGE = """<!doctype html>
<script type="importmap">{"imports": {"three": "./node_modules/three/build/three.module.js"}}</script>
<script type="module">
import * as THREE from "three";
import { GLTFLoader } from "./node_modules/three/examples/jsm/loaders/GLTFLoader.js";
window.picture = async (glb, pose, fovDeg, size) => {
  const renderer = new THREE.WebGLRenderer({ antialias: true, preserveDrawingBuffer: true });
  renderer.setPixelRatio(1);
  renderer.setSize(size, size);
  renderer.setClearColor(0xffffff);
  const bytes = Uint8Array.from(atob(glb), (letter) => letter.charCodeAt(0));
  const { scene } = await new GLTFLoader().parseAsync(bytes.buffer, "");
  const camera = new THREE.PerspectiveCamera(fovDeg, 1, 0.05, 50);
  camera.matrix.fromArray(pose).decompose(camera.position, camera.quaternion, camera.scale);
  const world = new THREE.Scene();
  world.add(scene);
  renderer.render(world, camera);
  const url = renderer.domElement.toDataURL("image/png");
  renderer.dispose();
  return url;
};
window.isReady = true;
</script>
"""


@functools.cache
def install(folder):
    """Put the packages into a folder, from the registry; return why that can't be, or an empty text."""
    if not shutil.which("npm") or not shutil.which("node"):
        return "npm and node are not installed"
    words = ["install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", "--prefix", str(folder), *PACKAGES]
    done = subprocess.run(["npm", *words], capture_output=True, text=True, timeout=300, cwd=folder)
    if done.returncode:
        return f"npm could not install {' '.join(PACKAGES)}: {done.stderr.strip()[-200:]}"
    (folder / "page.html").write_text(PAGE)
    return ""


def validate(file, folder):
    """Return the Khronos validator's messages on a file that are worse than notes, and what the file holds."""
    done = subprocess.run(["node", "-e", VALIDATE, str(file)], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return [message for message in report["issues"]["messages"] if message["severity"] < 2], report["info"]


class Viewer:
    """A page of three.js without a light, in Chromium."""

    def __init__(self, folder):
        self.driver = start_chromium(*WEBGL, "--allow-file-access-from-files")
        self.driver.set_script_timeout(120)
        self.driver.get((folder / "page.html").as_uri())
        wait = "const done = arguments[0]; const ask = () => (window.isReady ? done() : setTimeout(ask, 20)); ask()"
        self.driver.execute_async_script(wait)

    def pictures(self, file, cameras, size):
        """Return (B, 3, size, size) pictures in [0, 1] of a GLB on white, from the particle's own cameras."""
        glb = base64.b64encode(file.read_bytes()).decode()
        found = []
        for c2w, fov in zip(cameras.c2w.double().numpy(), cameras.fov.tolist(), strict=True):
            pose = (TO_GLTF @ c2w).T.reshape(-1).tolist()  # three.js' cameras have our axes, its matrices stand column by column
            script = "const done = arguments[4]; window.picture(...[...arguments].slice(0, 4)).then(done, (error) => done(String(error)))"
            url = self.driver.execute_async_script(script, glb, pose, np.degrees(fov), size)
            assert url.startswith("data:image/png;base64,"), url
            found.append(iio.imread(base64.b64decode(url.partition(",")[2]))[..., :3])
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255

    def close(self):
        self.driver.quit()
