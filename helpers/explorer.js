// Brings every explorer on the page to life that is not yet; see explorer.py for what they are made of.
(() => {
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  const start = (root) => {
    const { labels, parts } = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const controls = labels.map((_, k) => root.querySelector(`[data-axis="${k}"]`));
    const slider = root.querySelector(".controls input[type=range]");
    const along = controls.indexOf(slider);
    const [play, label, status] = ["button", ".slider span", "[role=status]"].map((what) => root.querySelector(what));

    const place = (control) => {
      if (!control) return 0; // an axis of one label
      if (control.localName === "select") return control.selectedIndex;
      if (control === slider) return Number(slider.value);
      return [...control.querySelectorAll("input")].reduce((sum, box, k) => sum + box.checked * 2 ** k, 0);
    };

    const show = () => {
      const at = controls.map(place);
      for (const element of root.querySelectorAll("[data-part]")) {
        const { steps, shown } = parts[element.dataset.part];
        const now = shown[steps.reduce((sum, step, k) => sum + step * at[k], 0)];
        if (element.localName === "img") [element.src, element.alt] = now;
        else if (element.innerHTML !== now) element.innerHTML = now;
      }
      if (!slider) return;
      for (const dot of root.querySelectorAll("[data-at]")) dot.classList.toggle("now", dot.dataset.at == at[along]);
      label.textContent = labels[along][at[along]];
      slider.setAttribute("aria-valuetext", label.textContent);
    };

    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = still.matches ? "Next" : "Play";
      status.setAttribute("aria-live", "polite");
    };
    const step = () => {
      slider.value = (Number(slider.value) + 1) % labels[along].length;
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
