"use strict";
// The dependency graph of one page: move it, zoom it, drag nodes, click one to see what it observes.
(() => {
  const view = document.currentScript.closest(".view");
  const data = JSON.parse(view.querySelector("script[type='application/json']").textContent);
  const svg = view.querySelector(".canvas svg");
  const panel = view.querySelector(".panel");
  const whole = svg.getAttribute("viewBox").split(" ").map(Number);
  let box = [...whole];
  let chosen = null;

  const nodes = new Map([...svg.querySelectorAll(".node")].map((g) => [g.dataset.node, g]));
  const offsets = new Map([...nodes.keys()].map((name) => [name, [0, 0]]));
  const ways = [...svg.querySelectorAll("path[data-source]")].map((path) => ({
    path,
    points: path.getAttribute("d").match(/-?[\d.]+,-?[\d.]+/g).map((p) => p.split(",").map(Number)),
  }));

  const show = () => svg.setAttribute("viewBox", box.join(" "));
  const scale = () => Math.max(box[2] / svg.clientWidth, box[3] / svg.clientHeight);
  const clamp = (factor) => Math.min(Math.max(factor, whole[2] / 20 / box[2]), (4 * whole[2]) / box[2]);
  function zoom(factor, x = svg.clientWidth / 2, y = svg.clientHeight / 2) {
    const by = clamp(factor);
    const at = new DOMPoint(x, y);
    const left = box[0] + (at.x / svg.clientWidth) * box[2];
    const top = box[1] + (at.y / svg.clientHeight) * box[3];
    box = [left - (left - box[0]) * by, top - (top - box[1]) * by, box[2] * by, box[3] * by];
    show();
  }

  function draw(path, points) {
    const [first, ...rest] = points.map((p) => p.map((n) => n.toFixed(1)).join(","));
    const curves = [];
    for (let i = 0; i < rest.length; i += 3) curves.push("C" + rest.slice(i, i + 3).join(" "));
    path.setAttribute("d", `M${first} ${curves.join(" ")}`);
  }
  function move(name, dx, dy) {
    const offset = offsets.get(name);
    offset[0] += dx;
    offset[1] += dy;
    nodes.get(name).setAttribute("transform", `translate(${offset[0]},${offset[1]})`);
    for (const { path, points } of ways) {
      const last = points.length - 1;
      const ends = [[path.dataset.source, [0, 1]], [path.dataset.target, [last - 1, last]]];
      for (const [end, indices] of ends) {
        if (end === name) indices.forEach((i) => (points[i] = [points[i][0] + dx, points[i][1] + dy]));
      }
      if ([path.dataset.source, path.dataset.target].includes(name)) draw(path, points);
    }
  }

  // Pointers: a node is dragged, the rest is moved; a press without a move is a click.
  let press = null;
  svg.addEventListener("pointerdown", (event) => {
    const node = event.target.closest(".node");
    press = { x: event.clientX, y: event.clientY, name: node && node.dataset.node, moved: false };
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (!press) return;
    const dx = event.clientX - press.x;
    const dy = event.clientY - press.y;
    if (!press.moved && Math.hypot(dx, dy) < 4) return;
    press = { ...press, x: event.clientX, y: event.clientY, moved: true };
    svg.classList.add("moving");
    if (press.name) move(press.name, dx * scale(), dy * scale());
    else {
      box[0] -= dx * scale();
      box[1] -= dy * scale();
      show();
    }
  });
  const release = () => {
    if (press && !press.moved) choose(press.name || null);
    press = null;
    svg.classList.remove("moving");
  };
  svg.addEventListener("pointerup", release);
  svg.addEventListener("pointercancel", () => {
    press = null;
  });
  svg.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const corner = svg.getBoundingClientRect();
      zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, event.clientX - corner.x, event.clientY - corner.y);
    },
    { passive: false },
  );
  view.querySelector("[data-do=in]").addEventListener("click", () => zoom(1 / 1.3));
  view.querySelector("[data-do=out]").addEventListener("click", () => zoom(1.3));
  view.querySelector("[data-do=all]").addEventListener("click", () => {
    box = [...whole];
    show();
  });

  // The panel. Text is only ever set as text.
  function element(tag, text = "", name = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    if (name) made.className = name;
    return made;
  }
  function list(title, entries) {
    const items = element("ul");
    for (const [label, why] of entries) {
      const item = element("li", label);
      if (why) item.append(element("div", why, "why"));
      items.append(item);
    }
    panel.append(element("h4", title), items);
  }
  function choose(name) {
    chosen = name;
    const about = name === null ? null : data.nodes[name];
    const seen = about ? about.observes.map((entry) => entry.agent) : [];
    for (const [other, group] of nodes) {
      group.classList.toggle("chosen", other === name);
      group.classList.toggle("seen", seen.includes(other) && other !== name);
      group.classList.toggle("faded", about !== null && other !== name && !seen.includes(other));
    }
    panel.replaceChildren();
    if (!about) {
      panel.append(element("p", "Click a node to see what it observes, and why."));
      return;
    }
    panel.append(element("h3", name), element("div", about.role, "why"));
    if (about.run.length) {
      const table = element("table");
      for (const [label, value] of about.run) {
        const row = element("tr");
        row.append(element("td", label), element("td", value));
        table.append(row);
      }
      panel.append(table);
    }
    if (about.curve) {
      const drawing = new DOMParser().parseFromString(about.curve, "image/svg+xml");
      panel.append(document.importNode(drawing.documentElement, true));
    }
    list("Observes", about.observes.map((e) => [`${e.agent} (${e.dependency})`, e.why]));
    if (!about.observes.length) panel.append(element("p", "No agent."));
    list("Is observed by", about.observed_by.map((agent) => [agent, ""]));
    if (!about.observed_by.length) panel.append(element("p", "No agent."));
    if (about.never.length) list("Never observes", about.never.map((e) => [e.agent, e.why]));
  }
  for (const [name, group] of nodes) {
    group.setAttribute("tabindex", "0");
    group.setAttribute("role", "button");
    group.setAttribute("aria-label", name);
    group.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        choose(name);
      }
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && chosen !== null) choose(null);
  });
  choose(null);
})();
