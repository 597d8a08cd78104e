// A mesh in a canvas, by WebGL and nothing else: GLBs as export/glb.py writes them, one primitive, unlit.
// The camera stays from one run to the next, so that runs are compared from one side.
const FOV_DEG = 40, MARGIN = 1.05, DEGREES_A_PIXEL = 0.5, FRONT = { azimuth: 0, elevation: 15, zoom: 1 };
const orbit = { ...FRONT }, solid = { on: false, run: null, asked: 0, model: null };

const VERTEX = `#version 300 es
uniform mat3 turn; // rows: to the right, upwards, towards the camera
uniform vec3 center;
uniform float distance;
uniform vec4 lens;
in vec3 POSITION, COLOR_0;
in vec2 TEXCOORD_0;
out vec3 light;
out vec2 place;
void main() {
  vec3 seen = turn * (POSITION - center);
  float away = distance - seen.z;
  gl_Position = vec4(lens.xy * seen.xy, lens.z * away - lens.w, away);
  light = COLOR_0;
  place = TEXCOORD_0;
}`;
// glTF's colours are linear; the texture unit makes the texture's so.
const FRAGMENT = `#version 300 es
precision highp float;
uniform sampler2D texels;
uniform bool textured;
in vec3 light;
in vec2 place;
out vec4 shown;
void main() {
  vec3 linear = clamp(textured ? texture(texels, place).rgb : light, 0.0, 1.0);
  shown = vec4(mix(1.055 * pow(linear, vec3(1.0 / 2.4)) - 0.055, 12.92 * linear, lessThanEqual(linear, vec3(0.0031308))), 1.0);
}`;

const canvas = make("canvas", { tabindex: 0, role: "img" });
const chosen = make("select", {}), shows = make("p", { class: "note", role: "status" });
const solidPanel = make("div", { class: "solid" }, canvas, make("label", { class: "turn" }, make("span", { text: "Particle" }), chosen), shows);
let gl = null, program = null;

function begin() {
  gl = canvas.getContext("webgl2");
  if (!gl) throw new Error("this browser has no WebGL 2");
  program = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) throw new Error(gl.getProgramInfoLog(program));
  gl.useProgram(program);
  gl.enable(gl.DEPTH_TEST);
  gl.clearColor(1, 1, 1, 1); // as the turntables' ground
}

function parseGlb(bytes) {
  const view = new DataView(bytes.buffer);
  if (bytes.length < 20 || view.getUint32(0, true) !== 0x46546c67) throw new Error("it is no GLB");
  const length = view.getUint32(12, true), tree = JSON.parse(new TextDecoder().decode(bytes.subarray(20, 20 + length)));
  const part = ({ byteOffset = 0, byteLength }) => bytes.slice(28 + length + byteOffset, 28 + length + byteOffset + byteLength);
  const numbers = (index) => {
    const { bufferView, componentType, count, type } = tree.accessors[index];
    const Kind = { 5123: Uint16Array, 5125: Uint32Array, 5126: Float32Array }[componentType];
    return new Kind(part(tree.bufferViews[bufferView]).buffer, 0, count * { SCALAR: 1, VEC2: 2, VEC3: 3 }[type]);
  };
  const { attributes, indices, material } = tree.meshes[0].primitives[0];
  const texture = tree.materials?.[material]?.pbrMetallicRoughness?.baseColorTexture;
  const picture = texture && part(tree.bufferViews[tree.images[tree.textures[texture.index].source].bufferView]);
  const read = (name) => (attributes[name] === undefined ? null : numbers(attributes[name]));
  return { POSITION: read("POSITION"), COLOR_0: read("COLOR_0"), TEXCOORD_0: read("TEXCOORD_0"), indices: numbers(indices), picture };
}

// The middle of the box around a mesh, and how far its vertices are from there.
function sphere({ POSITION: places }) {
  const low = [Infinity, Infinity, Infinity], high = low.map((value) => -value);
  places.forEach((value, i) => { low[i % 3] = Math.min(low[i % 3], value); high[i % 3] = Math.max(high[i % 3], value); });
  const center = low.map((value, axis) => (value + high[axis]) / 2);
  let radius = 0;
  for (let i = 0; i < places.length; i += 3) radius = Math.max(radius, Math.hypot(...center.map((value, axis) => places[i + axis] - value)));
  if (!(radius > 0 && radius < Infinity)) throw new Error("it has no size");
  return { center, radius };
}

async function upload(mesh, ticket) {
  const picture = mesh.picture && (await createImageBitmap(new Blob([mesh.picture]), { premultiplyAlpha: "none", colorSpaceConversion: "none" }));
  if (ticket !== solid.asked) return null;
  if (!gl) begin();
  for (const [name, size] of [["POSITION", 3], ["COLOR_0", 3], ["TEXCOORD_0", 2]]) {
    const place = gl.getAttribLocation(program, name);
    gl.disableVertexAttribArray(place);
    if (!mesh[name]) continue;
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, mesh[name], gl.STATIC_DRAW);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, size, gl.FLOAT, false, 0, 0);
  }
  gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, mesh.indices, gl.STATIC_DRAW);
  gl.uniform1i(gl.getUniformLocation(program, "textured"), picture ? 1 : 0);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.SRGB8_ALPHA8, gl.RGBA, gl.UNSIGNED_BYTE, picture || new ImageData(1, 1));
  gl.generateMipmap(gl.TEXTURE_2D);
  return { count: mesh.indices.length, kind: mesh.indices instanceof Uint32Array ? gl.UNSIGNED_INT : gl.UNSIGNED_SHORT, ...sphere(mesh) };
}

function draw() {
  const { model } = solid;
  if (!model || !canvas.clientWidth || gl.isContextLost()) return;
  [canvas.width, canvas.height] = [canvas.clientWidth, canvas.clientHeight].map((value) => Math.round(value * devicePixelRatio));
  gl.viewport(0, 0, canvas.width, canvas.height);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  // Azimuth 0 sees the front, +z; up is +y.
  const [a, e, half] = [orbit.azimuth, orbit.elevation, FOV_DEG / 2].map((deg) => (deg * Math.PI) / 180);
  const right = [Math.cos(a), 0, -Math.sin(a)], up = [-Math.sin(e) * Math.sin(a), Math.cos(e), -Math.sin(e) * Math.cos(a)];
  const towards = [Math.cos(e) * Math.sin(a), Math.sin(e), Math.cos(e) * Math.cos(a)];
  const distance = (MARGIN * model.radius) / Math.sin(half) / orbit.zoom, aspect = canvas.width / canvas.height;
  const near = Math.max(distance - model.radius, model.radius / 100), far = distance + model.radius, scale = 1 / Math.tan(half);
  const uniform = (name) => gl.getUniformLocation(program, name);
  gl.uniformMatrix3fv(uniform("turn"), false, [0, 1, 2].flatMap((axis) => [right[axis], up[axis], towards[axis]])); // column by column
  gl.uniform3fv(uniform("center"), model.center);
  gl.uniform1f(uniform("distance"), distance);
  gl.uniform4f(uniform("lens"), scale / Math.max(aspect, 1), scale * Math.min(aspect, 1), (far + near) / (far - near), (2 * far * near) / (far - near));
  gl.drawElements(gl.TRIANGLES, model.count, model.kind, 0);
}

async function bytesOf(run, { particle, file }) {
  if (!file && document.readyState === "loading") await new Promise((arrived) => addEventListener("load", arrived, { once: true }));
  if (!file) return Uint8Array.from(atob(at(`mesh-${run.number}-${particle}`).textContent), (letter) => letter.charCodeAt(0));
  if (location.protocol === "file:") {
    throw new Error("it is a file beside this page, which browsers load from servers alone: run python -m http.server --bind 127.0.0.1 in the sweep's folder");
  }
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file}: ${answer.status} ${answer.statusText}`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function showMesh() {
  const { run } = solid, mesh = run.meshes[chosen.value], ticket = ++solid.asked;
  solid.model = null;
  canvas.setAttribute("aria-label", `Mesh of particle ${mesh.particle}: ${run.prompt.slice(0, 200)}`);
  canvas.dataset.shows = "";
  shows.textContent = "loading";
  try {
    const parsed = parseGlb(await bytesOf(run, mesh));
    if (ticket !== solid.asked) return; // another one was asked for meanwhile
    const model = await upload(parsed, ticket);
    if (!model) return;
    solid.model = model;
    shows.textContent = `${(model.count / 3).toLocaleString("en")} faces${mesh.file ? "" : ", of a light copy"}. Drag to turn, wheel to zoom, double-click to begin anew.`;
    canvas.dataset.shows = `${run.number}-${mesh.particle}`;
  } catch (error) {
    shows.textContent = `The mesh can't be shown: ${error.message}`;
  }
  canvas.hidden = !solid.model;
  requestAnimationFrame(draw);
}

function meshPanel(run) {
  solid.run = run;
  chosen.replaceChildren(...run.meshes.map(({ particle }, value) => make("option", { value, text: String(particle) })));
  chosen.parentElement.hidden = run.meshes.length < 2;
  showMesh();
  return solidPanel;
}

function turnBy(azimuth, elevation, zoom = 1) {
  orbit.azimuth += azimuth;
  orbit.elevation = Math.min(89, Math.max(-89, orbit.elevation + elevation));
  orbit.zoom = Math.min(8, Math.max(0.25, orbit.zoom * zoom));
  requestAnimationFrame(draw);
}

chosen.addEventListener("change", showMesh);
new ResizeObserver(draw).observe(canvas);
let held = null;
canvas.addEventListener("pointerdown", (event) => { held = event; canvas.setPointerCapture(event.pointerId); });
canvas.addEventListener("lostpointercapture", () => { held = null; });
canvas.addEventListener("pointermove", (event) => {
  if (held?.pointerId !== event.pointerId) return;
  turnBy(DEGREES_A_PIXEL * (held.clientX - event.clientX), DEGREES_A_PIXEL * (event.clientY - held.clientY));
  held = event;
});
canvas.addEventListener("wheel", (event) => { event.preventDefault(); turnBy(0, 0, Math.exp(-event.deltaY / 1000)); }, { passive: false });
canvas.addEventListener("dblclick", () => { Object.assign(orbit, FRONT); draw(); });
canvas.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: [10, 0], ArrowRight: [-10, 0], ArrowUp: [0, 10], ArrowDown: [0, -10], "+": [0, 0, 1.2], "-": [0, 0, 1 / 1.2] }[event.key];
  if (by) { event.preventDefault(); turnBy(...by); }
});
canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
canvas.addEventListener("webglcontextrestored", () => { begin(); showMesh(); });
