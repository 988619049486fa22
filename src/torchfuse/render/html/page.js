"use strict";
// The page is whole without this script: it makes the charts answer to the pointer, and draws the
// graph. Nothing is loaded from anywhere.

const narrow = matchMedia("(max-width: 46rem)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const data = (id) => {
  const element = document.getElementById(id);
  return element ? JSON.parse(element.textContent) : null;
};

// ── charts ──────────────────────────────────────────────────────────────────────────────────────

let vegaIsThere = false;
function makeLive(element, specs) {
  if (!vegaIsThere) {
    // Vega is large: it is read when a chart is first touched, so that the page opens at once.
    const script = document.createElement("script");
    script.textContent = document.getElementById("vega").textContent;
    document.head.append(script);
    vegaIsThere = true;
  }
  let holder = element.querySelector(".vega");
  if (!holder) {
    holder = document.createElement("div");
    holder.className = "vega";
    element.append(holder);
  }
  const height = element.getBoundingClientRect().height;
  element.style.minHeight = `${height}px`; // the page does not jump while it is drawn
  const spec = { ...specs[element.dataset.chart][narrow.matches ? 1 : 0], width: element.clientWidth };
  element.classList.add("live");
  vegaEmbed(holder, spec, { actions: false, renderer: "svg" }).then(() => {
    element.dataset.state = "live";
    element.style.minHeight = "";
  });
}

const specs = data("specs");
for (const element of document.querySelectorAll(".chart")) {
  const once = () => {
    if (!element.classList.contains("live")) makeLive(element, specs);
  };
  element.addEventListener("pointerenter", once, { once: true });
}
narrow.addEventListener("change", () => {
  for (const element of document.querySelectorAll(".chart.live")) makeLive(element, specs);
});

// ── the graph ───────────────────────────────────────────────────────────────────────────────────

const graphs = data("nodes");
if (graphs) {
  const legends = data("legends");
  const box = document.getElementById("picture");
  const facts = document.getElementById("node");
  const select = document.getElementById("colour");
  const search = document.getElementById("search");
  document.querySelector(".needs-script").hidden = false;
  let which = graphs.after.length ? "after" : "before";
  let view = null;
  let chosen = -1;

  const paint = { merged: "merged", skipped: "skipped", int8: "int8", float: "fp32", inside: "merged", outside: "skipped" };
  const label = (node) => {
    const module = node.module.length > 26 ? `…${node.module.slice(-25)}` : node.module;
    return module ? `${node.kind}\n${module}` : node.kind;
  };

  // Positions by dagre, straight from its own graph.
  function positions(nodes) {
    const g = new dagre.graphlib.Graph();
    g.setGraph({ rankdir: "TB", nodesep: 18, ranksep: 26 });
    g.setDefaultEdgeLabel(() => ({}));
    for (const node of nodes) g.setNode(String(node.id), { width: 190, height: 44 });
    for (const node of nodes) for (const from of node.inputs) g.setEdge(String(from), String(node.id));
    dagre.layout(g);
    return Object.fromEntries(nodes.map((node) => [node.id, (({ x, y }) => ({ x, y }))(g.node(String(node.id)))]));
  }

  function style() {
    return [
      { selector: "node", style: {
        shape: "round-rectangle", width: 190, height: 44, label: "data(label)", "text-wrap": "wrap",
        "text-valign": "center", "font-size": 12, "font-family": "system-ui, sans-serif", color: colour("ink"),
        "background-color": colour("node"), "border-width": 1, "border-color": colour("line"),
      } },
      ...Object.entries(paint).map(([state, name]) => ({ selector: `node[state = "${state}"]`, style: {
        "border-width": 3, "border-color": colour(name), "background-color": colour(name), "background-opacity": 0.16,
      } })),
      { selector: "node[share >= 0]", style: {
        "background-color": colour("int8"), "background-opacity": "mapData(share, 0, 0.12, 0.05, 0.75)", "border-color": colour("int8"),
      } },
      { selector: "edge", style: {
        width: 1.5, "line-color": colour("quiet"), opacity: 0.7, "curve-style": "bezier",
        "target-arrow-shape": "triangle", "target-arrow-color": colour("quiet"), "arrow-scale": 0.8,
      } },
      { selector: "node.found", style: { "border-width": 4, "border-color": colour("accent") } },
      { selector: "node:selected", style: { "border-width": 5, "border-color": colour("accent") } },
      { selector: "node.dim", style: { opacity: 0.35 } },
    ];
  }

  function recolour() {
    const mode = select.value;
    view.batch(() => view.nodes().forEach((element) => {
      const node = graphs[which][Number(element.id())];
      // Values and not removeData, after which a node keeps its colour.
      element.data({ share: node.shares[mode] ?? -1, state: node.states[mode] || "" });
    }));
    const entry = legends.find(([name]) => name === mode);
    const legend = document.querySelector(".legend");
    legend.replaceChildren();
    for (const [state, title] of entry ? entry[2] : []) {
      const item = document.createElement("span");
      const patch = document.createElement("i");
      patch.style.background = `var(--${state === "share" ? "int8" : paint[state]})`;
      const count = graphs[which].filter((node) => node.states[mode] === state).length;
      item.append(patch, state === "share" ? title : `${title} (${count})`);
      legend.append(item);
    }
  }

  function start() {
    // The top of the graph, large enough to be read; "Whole" shows all of it.
    const bounds = view.elements().boundingBox();
    const zoom = Math.min(1, (box.clientWidth - 24) / bounds.w);
    view.zoom(Math.max(zoom, 0.45));
    const first = view.nodes()[0].position();
    view.pan({ x: box.clientWidth / 2 - first.x * view.zoom(), y: 36 - (first.y - 22) * view.zoom() });
  }

  function draw() {
    const nodes = graphs[which];
    const at = positions(nodes);
    if (view) view.destroy();
    view = cytoscape({
      container: box,
      elements: [
        ...nodes.map((node) => ({ data: { id: String(node.id), label: label(node) }, position: at[node.id] })),
        ...nodes.flatMap((node) => node.inputs.map((from) => ({ data: { source: String(from), target: String(node.id) } }))),
      ],
      layout: { name: "preset" }, style: style(), minZoom: 0.03, maxZoom: 2.5, autoungrabify: true,
      userZoomingEnabled: false, // the wheel scrolls the page; the buttons zoom
    });
    view.on("select", "node", (event) => tell(graphs[which][Number(event.target.id())]));
    chosen = -1;
    recolour();
    start();
    find();
    box.dataset.state = `drawn ${which} ${nodes.length}`;
  }

  function tell(node) {
    chosen = node.id;
    facts.textContent = [`${node.kind}${node.module ? ` in ${node.module}` : ""}`,
      ...node.facts.map(([name, value]) => `${name}: ${value}`)].join(" · ");
  }

  function go(id) {
    view.nodes().unselect();
    const element = view.getElementById(String(id));
    element.select();
    view.center(element);
  }

  let matches = [];
  function find() {
    const word = search.value.trim().toLowerCase();
    matches = word ? graphs[which].filter((node) => `${node.kind} ${node.module}`.toLowerCase().includes(word)).map((node) => node.id) : [];
    const wanted = new Set(matches);
    view.batch(() => view.nodes().forEach((element) => {
      element.toggleClass("found", wanted.has(Number(element.id())));
      element.toggleClass("dim", word !== "" && !wanted.has(Number(element.id())));
    }));
    if (word) facts.textContent = matches.length ? `${matches.length} of ${graphs[which].length} calls; Enter goes through them.` : "No call of that name.";
  }

  const zoom = (factor) => view.zoom({ level: view.zoom() * factor, renderedPosition: { x: box.clientWidth / 2, y: box.clientHeight / 2 } });
  search.addEventListener("input", () => { find(); if (matches.length) view.center(view.getElementById(String(matches[0]))); });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && matches.length) go(matches[(matches.indexOf(chosen) + 1) % matches.length]);
  });
  select.addEventListener("change", recolour);
  for (const button of document.querySelectorAll("[data-which]")) button.addEventListener("click", () => {
    which = button.dataset.which;
    for (const other of document.querySelectorAll("[data-which]")) other.setAttribute("aria-pressed", String(other === button));
    draw();
  });
  for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => {
    if (button.dataset.zoom === "fit") view.fit(undefined, 12); else zoom(button.dataset.zoom === "in" ? 1.3 : 1 / 1.3);
  });
  box.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [0, 80], ArrowDown: [0, -80], ArrowLeft: [80, 0], ArrowRight: [-80, 0] };
    const count = graphs[which].length;
    if (steps[event.key]) view.panBy({ x: steps[event.key][0], y: steps[event.key][1] });
    else if (event.key === "+" || event.key === "=") zoom(1.3);
    else if (event.key === "-") zoom(1 / 1.3);
    else if (event.key === "n") go((chosen + 1) % count);
    else if (event.key === "p") go((chosen - 1 + count) % count);
    else return;
    event.preventDefault();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { view.style(style()); recolour(); });
  for (const button of document.querySelectorAll("[data-which]")) button.setAttribute("aria-pressed", String(button.dataset.which === which));
  // Drawn when it comes into sight, so that the page opens at once.
  new IntersectionObserver((entries, observer) => {
    if (entries.some((entry) => entry.isIntersecting)) { observer.disconnect(); draw(); }
  }, { rootMargin: "400px" }).observe(box);
}
