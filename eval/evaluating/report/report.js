"use strict";
// Slider, flicker, menus, search and sorting. Texts are set as textContent only: prompts are untrusted.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const pick = (id) => document.getElementById(id);
  const list = pick("list");
  const articles = [...list.children];
  const menus = { candidate: pick("candidate"), reward: pick("reward"), view: pick("view") };
  document.documentElement.classList.add("js");

  const candidate = () => Number(menus.candidate.value);
  const reward = () => Number(menus.reward.value);
  const minus = (text) => text.replace("-", "\u2212");
  const digits = (value) => minus(Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(4));
  const difference = (value) => (value > 0 ? "+" : "") + minus(String(Number(value.toPrecision(3))));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const scores = (who, what, prompt) => data.scores[who][what][prompt];

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Mean scores of the chosen reward over the images of a prompt: base, tuned.
  function means(prompt) {
    return [data.bases[candidate()], candidate()].map((who) => mean(scores(who, reward(), prompt)));
  }

  function copyOf(shot, who) {
    const source = shot.querySelector(`figure[data-candidate="${who}"] img`);
    const image = element("img");
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 128));
    image.alt = source.alt;
    image.src = source.src;
    return image;
  }

  // The tuned image; dragging pulls the base over it from the left, Flicker shows the one or the other.
  function slider(shot, base, tuned, label, start) {
    const stage = element("div", "stage");
    const over = copyOf(shot, base);
    over.classList.add("over");
    const names = [element("span", "name left", "base"), element("span", "name right", "tuned")];
    const range = element("input");
    Object.assign(range, { type: "range", min: 0, max: 100, step: 1 });
    range.setAttribute("aria-label", `Share of the base image over the tuned one, ${label}`);
    const flicker = element("button", "flicker", "Flicker");
    flicker.type = "button";
    flicker.setAttribute("aria-label", `Flicker between base and tuned, ${label}`);
    const cut = (share) => {
      range.value = share;
      range.setAttribute("aria-valuetext", `${share} % base, ${100 - share} % tuned`);
      stage.style.setProperty("--cut", `${share}%`);
      names[0].classList.toggle("faint", share < 35);
      names[1].classList.toggle("faint", share > 65);
    };
    range.addEventListener("input", () => cut(Number(range.value)));
    flicker.addEventListener("click", () => cut(Number(range.value) === 100 ? 0 : 100));
    stage.append(copyOf(shot, tuned), over, element("div", "edge"), element("div", "knob", "◂▸"), ...names, range);
    cut(start);
    return [stage, flicker];
  }

  function sideBySide(shot, base, tuned, label) {
    const halves = element("div", "halves");
    const still = element("div", "stage");
    still.append(copyOf(shot, base), element("span", "name left", "base"));
    const [stage, flicker] = slider(shot, base, tuned, label, 0);
    halves.append(still, stage);
    return [halves, flicker];
  }

  function scoreTable(base, tuned, prompt, image, flicker) {
    const table = element("table", "pair");
    const head = table.createTHead().insertRow();
    head.append(element("th"), ...["base", "tuned", "change"].map((title) => element("th", "", title)));
    head.firstChild.append(flicker);
    data.rewards.forEach((name, what) => {
      const pair = [base, tuned].map((who) => scores(who, what, prompt)[image]);
      const change = pair[1] - pair[0];
      const row = table.insertRow();
      row.classList.toggle("chosen", what === reward() && data.rewards.length > 1);
      row.append(element("th", "", name), element("td", "", digits(pair[0])), element("td", "", digits(pair[1])));
      row.append(element("td", change < 0 ? "worse" : "better", difference(change)));
    });
    return table;
  }

  function compare(place, prompt, image) {
    const shot = pick(`p${prompt}`).querySelector(`.shot[data-image="${image}"]`);
    const [base, tuned] = [data.bases[candidate()], candidate()];
    const label = `image ${image + 1} of prompt ${prompt}`;
    let [shown, flicker] = [element("p", "left-out", "Image left out."), ""];
    if (shot && menus.view.value === "side") [shown, flicker] = sideBySide(shot, base, tuned, label);
    else if (shot) [shown, flicker] = slider(shot, base, tuned, label, 50);
    place.replaceChildren(shown, scoreTable(base, tuned, prompt, image, flicker));
  }

  // Items near the window are built with the current choice, the others when they come near.
  const near = new Set();
  const chosen = () => `${candidate()} ${reward()} ${menus.view.value}`;
  function build(item) {
    if (item.dataset.built === chosen()) return;
    item.dataset.built = chosen();
    const prompt = Number(item.dataset.prompt);
    const shots = item.matches(".slot") ? [item] : item.querySelectorAll(".shot");
    for (const shot of shots) compare(shot.querySelector(".here"), prompt, Number(shot.dataset.image));
    const line = item.querySelector(".means");
    if (!line) return;
    const [base, tuned] = means(prompt);
    line.hidden = false;
    line.textContent = `${data.rewards[reward()]}, mean: ${digits(base)} to ${digits(tuned)} (${difference(tuned - base)})`;
  }
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) near.add(entry.target);
        else near.delete(entry.target);
        if (entry.isIntersecting) build(entry.target);
      }
    },
    { rootMargin: "800px 0px" },
  );
  for (const item of [...articles, ...document.querySelectorAll(".slot")]) observer.observe(item);

  function filter() {
    const words = pick("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = [...document.querySelectorAll("select.category")].map((menu) => menu.value);
    const pictured = pick("with-pictures")?.checked;
    let count = 0;
    for (const article of articles) {
      const text = article.querySelector("h3").lastChild.textContent.toLowerCase();
      const categories = JSON.parse(article.dataset.categories);
      const fits =
        words.every((word) => text.includes(word)) &&
        wanted.every((value, column) => !value || categories[column] === value) &&
        (!pictured || article.querySelector(".shot"));
      article.hidden = !fits;
      count += fits ? 1 : 0;
    }
    pick("count").textContent = `${count} of ${articles.length} prompts`;
  }

  function sort() {
    const how = pick("sort").value;
    const gains = articles.map((_, prompt) => means(prompt)).map(([base, tuned]) => tuned - base);
    const order = articles.map((_, prompt) => prompt);
    if (how !== "order") order.sort((a, b) => (how === "gain" ? gains[b] - gains[a] : gains[a] - gains[b]));
    list.append(...order.map((prompt) => articles[prompt]));
  }

  function choose() {
    for (const part of document.querySelectorAll("[data-model]")) {
      const other = part.dataset.reward !== undefined && Number(part.dataset.reward) !== reward();
      part.hidden = Number(part.dataset.model) !== candidate() || other;
    }
    sort();
    near.forEach(build);
  }

  for (const menu of Object.values(menus)) menu.addEventListener("change", choose);
  for (const menu of document.querySelectorAll("select.category, #with-pictures")) menu.addEventListener("change", filter);
  pick("search").addEventListener("input", filter);
  pick("sort").addEventListener("change", sort);
  document.querySelector("form.filters").addEventListener("submit", (event) => event.preventDefault());
  filter();
  choose();
})();
