// Brings every explorer on the page to life that is not yet; see render.py for what they are made of.
(() => {
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  const start = (root) => {
    const { axes, parts } = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const controls = axes.map((_, k) => root.querySelector(`[data-axis="${k}"]`));
    const slider = root.querySelector(".controls input[type=range]");
    const along = controls.indexOf(slider);
    const find = (what) => root.querySelector(what);
    const [play, reached, status, state] = ["button", ".slider span", "[role=status]", ".state"].map(find);

    const place = (control) => {
      if (!control) return 0; // an axis of one label
      if (control.localName === "select") return control.selectedIndex;
      if (control === slider) return Number(slider.value);
      return [...control.querySelectorAll("input")].reduce((sum, box, k) => sum + box.checked * 2 ** k, 0);
    };

    const show = () => {
      const at = controls.map(place);
      const words = (counts) =>
        axes.flatMap(([name, labels], k) => (counts[k] ? `${name} ${labels[at[k]]}` : [])).join(", ");
      for (const element of root.querySelectorAll("[data-part]")) {
        const { name, steps, values, shown } = parts[element.dataset.part];
        const now = values[shown[steps.reduce((sum, step, k) => sum + step * at[k], 0)]];
        if (element.localName === "img") {
          element.src = `data:image/webp;base64,${now}`;
          element.alt = [name, words(steps)].filter(Boolean).join(": ");
        } else if (element.localName === "g") element.innerHTML = now;
        else element.textContent = now;
      }
      state.textContent = words(axes.map(([, labels]) => labels.length - 1));
      if (!slider) return;
      for (const dot of root.querySelectorAll("[data-at]")) dot.classList.toggle("now", Number(dot.dataset.at) === at[along]);
      reached.textContent = axes[along][1][at[along]];
      slider.setAttribute("aria-valuetext", reached.textContent);
    };

    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = still.matches ? "Next" : "Play";
      status.setAttribute("aria-live", "polite");
    };
    const step = () => {
      slider.value = (Number(slider.value) + 1) % axes[along][1].length;
      show();
      if (timer && (slider.value === slider.max || !root.isConnected)) stop();
    };
    const run = () => {
      timer = setInterval(step, 800);
      play.textContent = "Pause";
      status.setAttribute("aria-live", "off"); // nobody can listen at that pace
      step();
    };

    root.addEventListener("input", ({ target }) => {
      if (target.closest(".wipe")) target.closest(".wipe").style.setProperty("--cut", `${target.value}%`);
      else show();
      if (timer && target === slider) stop();
    });
    if (play) {
      play.addEventListener("click", () => (still.matches ? step() : timer ? stop() : run()));
      still.addEventListener("change", stop);
      stop();
    }
    const table = root.querySelector("details");
    if (table) {
      table.open = false;
      addEventListener("beforeprint", () => (table.open = true));
    }
    for (const control of root.querySelectorAll("[hidden]")) control.hidden = false;
    show();
  };

  for (const root of document.querySelectorAll(".explorer:not([data-ready])")) {
    root.dataset.ready = "";
    start(root);
  }
})();
