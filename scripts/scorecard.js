(() => {
  const form = document.querySelector(".claim-filter");
  const start = () => {
    const entries = [...document.querySelectorAll("[data-outcome]")];
    const sections = [...document.querySelectorAll("article section section")].filter(
      (section) => !section.contains(form),
    );
    const report = form.querySelector("output");
    const apply = () => {
      const wanted = Object.fromEntries(new FormData(form));
      const fits = (entry) =>
        ["group", "source", "outcome"].every(
          (name) => !wanted[name] || entry.dataset[name].split("|").includes(wanted[name]),
        );
      for (const entry of entries) entry.hidden = !fits(entry);
      for (const section of sections) {
        const inside = [...section.querySelectorAll("[data-outcome]")];
        section.hidden = inside.length > 0 && inside.every((entry) => entry.hidden);
      }
      report.textContent = `${entries.filter((entry) => !entry.hidden).length} of ${entries.length} claims`;
    };
    const showTarget = () => {
      const target = document.getElementById(location.hash.slice(1));
      if (target?.closest("[data-outcome]")?.hidden) form.reset();
    };
    form.addEventListener("change", apply);
    form.addEventListener("reset", () => setTimeout(apply));
    form.addEventListener("submit", (event) => event.preventDefault());
    window.addEventListener("hashchange", showTarget);
    form.hidden = false;
    apply();
  };
  document.addEventListener("DOMContentLoaded", start);
})();
