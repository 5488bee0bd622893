"""The page of turn.html: WebGL 2 and nothing else, so it opens from a disk without a network or a server.

Filled in by turning.py: @TITLE@, @DAY@ (text), @SCENE@ (JSON: the layers' names, colours and sizes) and
@DATA@ (base64 of the deflated arrays in the order of the layers: positions uint16 x 3, normals with cortex
int16 x 4, indices uint32 as differences).
"""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
  html, body { margin: 0; height: 100%; overflow: hidden; }
  body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #1f2933; }
  body { background: linear-gradient(#ffffff, #e3e9ef); }
  canvas { position: absolute; width: 100%; height: 100%; touch-action: none; cursor: grab; outline: none; }
  canvas:active { cursor: grabbing; }
  h1 { font-size: 22px; margin: 0; }
  small { color: #6b7785; font-size: 14px; }
  .part { position: absolute; pointer-events: none; }
  #head { left: 28px; top: 22px; }
  #legend { right: 28px; top: 22px; padding: 10px 16px; pointer-events: auto; }
  #legend { background: #ffffffcc; border-radius: 8px; }
  #legend label { display: block; cursor: pointer; white-space: nowrap; }
  #legend i { display: inline-block; width: 24px; margin: 0 9px 0 6px; border-radius: 2px; }
  #legend i, #legend input { vertical-align: middle; }
  #bar { left: 28px; bottom: 26px; text-align: center; }
  #bar div { height: 4px; background: #1f2933; }
  #help { left: 50%; bottom: 24px; transform: translateX(-50%); color: #6b7785; font-size: 13px; }
  #triad { right: 34px; bottom: 24px; width: 110px; height: 110px; }
  #triad line { stroke: #6b7785; stroke-width: 2; }
  #triad text { font-weight: bold; font-size: 14px; fill: #1f2933; }
  #triad text { text-anchor: middle; dominant-baseline: central; }
</style>
</head>
<body>
<canvas tabindex="0" aria-label="The brain as glass with the tumour in it; drag to turn"></canvas>
<div id="head" class="part"><h1>@TITLE@</h1><small>@DAY@</small></div>
<div id="legend" class="part"></div>
<div id="bar" class="part"><span></span><div></div></div>
<div id="help" class="part">drag to turn, wheel to zoom, shift-drag to move, double-click to start again</div>
<svg id="triad" class="part"><line/><text>R</text><line/><text>A</text><line/><text>S</text></svg>
<script>
"use strict";
const scene = @SCENE@;
const data = "@DATA@";

const vertexShader = `#version 300 es
in vec3 place; in vec4 shape;
uniform vec3 low, span, centre, right, up, towards; uniform vec2 zoom, shift;
out vec3 normal; out float cortex;
void main() {
  vec3 p = low + span * place - centre;
  normal = vec3(dot(shape.xyz, right), dot(shape.xyz, up), dot(shape.xyz, towards));
  cortex = shape.w;
  vec2 screen = vec2(dot(p, right), dot(p, up)) * zoom + shift;
  gl_Position = vec4(screen, -dot(p, towards) / 400.0, 1.0);
}`;
const fragmentShader = `#version 300 es
precision highp float;
in vec3 normal; in float cortex;
uniform vec3 colour, sulcus; uniform float opacity, glass;
out vec4 result;
void main() {
  vec3 n = normalize(normal);
  vec3 base = mix(colour, mix(sulcus, colour, cortex), glass);
  float depth = 1.0 - cortex, grazing = 1.0 - clamp(n.z, 0.0, 1.0);
  float clear = clamp(0.10 + 0.34 * pow(depth, 1.5) + 0.55 * pow(grazing, 2.5), 0.0, 0.9);
  vec3 key = normalize(vec3(-0.55, 0.75, 0.65)), fill = normalize(vec3(0.9, 0.1, 0.6));
  vec3 eye = vec3(0.0, 0.0, 1.0);
  float light = 0.42 + 0.52 * max(dot(n, key), 0.0) + 0.22 * max(dot(n, fill), 0.0);
  float shine = 0.28 * pow(max(dot(n, normalize(key + eye)), 0.0), 30.0);
  float alpha = opacity * mix(1.0, clear, glass);
  result = vec4((base * light + shine) * alpha, alpha);
}`;

async function start() {
  const canvas = document.querySelector("canvas");
  const gl = canvas.getContext("webgl2", { antialias: true, premultipliedAlpha: true });
  if (!gl) throw new Error("this browser has no WebGL 2; the same scene is in glass.png");
  const packed = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();

  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertexShader], [gl.FRAGMENT_SHADER, fragmentShader]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  gl.useProgram(program);
  const at = {};
  for (let i = 0; i < gl.getProgramParameter(program, gl.ACTIVE_UNIFORMS); i++) {
    const name = gl.getActiveUniform(program, i).name;
    at[name] = gl.getUniformLocation(program, name);
  }

  let offset = 0;
  const take = (kind, count) => new kind(buffer.slice(offset, (offset += count * kind.BYTES_PER_ELEMENT)));
  const attribute = (name, values, size, type) => {
    const where = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(where);
    gl.vertexAttribPointer(where, size, type, true, 0, 0);
  };
  for (const layer of scene.layers) {
    layer.array = gl.createVertexArray();
    gl.bindVertexArray(layer.array);
    attribute("place", take(Uint16Array, 3 * layer.points), 3, gl.UNSIGNED_SHORT);
    attribute("shape", take(Int16Array, 4 * layer.points), 4, gl.SHORT);
    const indices = take(Uint32Array, layer.indices);
    for (let i = 1; i < indices.length; i++) indices[i] += indices[i - 1];
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices, gl.STATIC_DRAW);
    layer.shown = true;
  }

  const view = { ...scene.view, x: 0, y: 0 };
  const home = { ...view };
  function draw() {
    const ratio = window.devicePixelRatio || 1, wide = canvas.clientWidth, tall = canvas.clientHeight;
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(tall * ratio);
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    gl.enable(gl.CULL_FACE);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.depthFunc(gl.LEQUAL);
    const ca = Math.cos(view.azimuth), sa = Math.sin(view.azimuth);
    const ce = Math.cos(view.elevation), se = Math.sin(view.elevation);
    const right = [-sa, ca, 0], up = [-se * ca, -se * sa, ce], towards = [ce * ca, ce * sa, se];
    const scale = Math.min(tall, wide * 0.95) / view.height;
    gl.uniform3fv(at.low, scene.low);
    gl.uniform3fv(at.span, scene.span);
    gl.uniform3fv(at.centre, scene.centre);
    gl.uniform3fv(at.right, right);
    gl.uniform3fv(at.up, up);
    gl.uniform3fv(at.towards, towards);
    gl.uniform2f(at.zoom, 2 * scale / wide, 2 * scale / tall);
    gl.uniform2f(at.shift, 2 * view.x * scale / wide, 2 * view.y * scale / tall);
    const pass = (layer, opacity, writes) => {
      gl.depthMask(writes);
      gl.uniform3fv(at.colour, layer.colour);
      gl.uniform3fv(at.sulcus, scene.sulcus);
      gl.uniform1f(at.opacity, opacity);
      gl.uniform1f(at.glass, layer.glass ? 1 : 0);
      gl.bindVertexArray(layer.array);
      gl.drawElements(gl.TRIANGLES, layer.indices, gl.UNSIGNED_INT, 0);
    };
    const shown = scene.layers.filter((layer) => layer.shown);
    for (const layer of shown) if (!layer.glass && layer.opacity >= 1) pass(layer, 1, true);
    for (const layer of shown) if (!layer.glass && layer.opacity < 1) pass(layer, layer.opacity, false);
    for (const layer of shown) if (layer.glass) {
      pass(layer, 0.2, false);
      gl.colorMask(false, false, false, false);
      pass(layer, 1, true);
      gl.colorMask(true, true, true, true);
      pass(layer, 1, true);
    }
    gl.depthMask(true);
    const length = [200, 100, 50, 20, 10, 5, 2, 1].find((mm) => mm * scale < 160) || 1;
    document.querySelector("#bar span").textContent = length + " mm";
    document.querySelector("#bar div").style.width = length * scale + "px";
    const set = (item, values) => {
      for (const [key, value] of Object.entries(values)) item.setAttribute(key, value);
    };
    const lines = document.querySelectorAll("#triad line");
    document.querySelectorAll("#triad text").forEach((letter, i) => {
      set(lines[i], { x1: 55, y1: 55, x2: 55 + 36 * right[i], y2: 55 - 36 * up[i] });
      set(letter, { x: 55 + 48 * right[i], y: 55 - 48 * up[i] });
    });
  }
  let waiting = false;
  const redraw = () => {
    if (!waiting) requestAnimationFrame(() => { waiting = false; draw(); });
    waiting = true;
  };

  const fingers = new Map();
  const spread = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a.x - b.x, a.y - b.y); };
  const enlarge = (factor) => { view.height = Math.min(Math.max(view.height / factor, 15), 800); redraw(); };
  const turn = (across, upwards) => {
    view.azimuth += across;
    view.elevation = Math.min(Math.max(view.elevation + upwards, -1.55), 1.55);
    redraw();
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  }
  canvas.addEventListener("pointermove", (event) => {
    const last = fingers.get(event.pointerId);
    if (!last) return;
    const dx = event.clientX - last.x, dy = event.clientY - last.y;
    const before = fingers.size === 2 ? spread() : 0;
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (fingers.size === 2) enlarge(spread() / before);
    else if (event.shiftKey) {
      const scale = Math.min(canvas.clientHeight, canvas.clientWidth * 0.95) / view.height;
      view.x += dx / scale;
      view.y -= dy / scale;
      redraw();
    } else turn(-dx / 150, dy / 150);
  });
  const wheel = (event) => { event.preventDefault(); enlarge(Math.exp(-event.deltaY / 600)); };
  canvas.addEventListener("wheel", wheel, { passive: false });
  canvas.addEventListener("dblclick", () => { Object.assign(view, home); redraw(); });
  canvas.addEventListener("keydown", (event) => {
    const turns = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
    if (turns[event.key]) turn(...turns[event.key]);
    if (event.key === "+" || event.key === "-") enlarge(event.key === "+" ? 1.1 : 1 / 1.1);
  });
  const legend = document.querySelector("#legend");
  for (const layer of scene.layers) {
    const [row, box, swatch] = ["label", "input", "i"].map((tag) => document.createElement(tag));
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => { layer.shown = box.checked; redraw(); });
    swatch.style.background = `rgb(${layer.colour.map((part) => Math.round(255 * part))})`;
    swatch.style.opacity = layer.opacity;
    swatch.style.height = layer.swatch + "px";
    row.append(box, swatch, layer.name);
    legend.append(row);
  }
  window.addEventListener("resize", redraw);
  draw();
}
start().catch((error) => { document.querySelector("#help").textContent = "Cannot draw: " + error.message; });
</script>
</body>
</html>
"""
