// The blind test on the landing page: one pair at a time, no answer before the end, nothing kept or sent.
const blindTest = {
  /** The chance of k or more right of n, each right with chance p. */
  atLeast(k, n, p) {
    let total = 0, term = (1 - p) ** n; // the chance of exactly i right, i = 0
    for (let i = 0; i <= n; i++) {
      if (i >= k) total += term;
      term *= ((n - i) / (i + 1)) * (p / (1 - p));
    }
    return total;
  },

  /** Clopper and Pearson's 95 % interval of the share of right answers, [low, high]. */
  interval(k, n) {
    const low = (hits) => {
      if (hits === 0) return 0;
      let below = 0, above = 1;
      for (let i = 0; i < 50; i++) {
        const p = (below + above) / 2;
        if (blindTest.atLeast(hits, n, p) < 0.025) below = p;
        else above = p;
      }
      return below;
    };
    return [low(k), 1 - low(n - k)];
  },

  /** The smallest number right of n whose interval lies above 1/2, or null. */
  needed(n) {
    for (let k = 0; k <= n; k++) if (n && blindTest.interval(k, n)[0] > 0.5) return k;
    return null;
  },

  sureness: ["can’t tell", "a guess", "fairly sure", "certain"],
  foils: { untrained: "Against the same network, untrained", edges: "Against an edge detector" },

  percent: (share) => `${Math.round(100 * share)}\u00a0%`,
  times: (chance) => (chance >= 0.01 ? `${Math.round(100 * chance)} of 100` : `${Math.round(1000 * chance)} of 1000`),

  /** What a count of right answers says, and what it does not. */
  meaning(k, n) {
    if (n === 0) return "You named no side, so there is nothing to score.";
    const [low, high] = blindTest.interval(k, n);
    const [tail, chance] = 2 * k < n
      ? ["fewer", 1 - blindTest.atLeast(k + 1, n, 0.5)]
      : ["more", blindTest.atLeast(k, n, 0.5)];
    const luck = `Guessing gets ${k} or ${tail} of ${n} right in ${blindTest.times(chance)} tries.`;
    if (low > 0.5) return `${luck} The interval lies above 50\u00a0%: on pairs like those you answered you do better than guessing.`;
    if (high < 0.5) return `${luck} The interval lies below 50\u00a0%: on pairs like those you answered you mostly take the other map.`;
    const needed = blindTest.needed(n);
    const limit = needed === null ? `No score on so few pairs could` : `Only ${needed === n ? "all" : `${needed} or more of`} ${n} right would`;
    return `${luck} The interval includes 50\u00a0%: this does not tell you from someone who guesses, nor does it show
      that you guessed. ${limit} rule guessing out.`;
  },

  picture(k, n) {
    const at = (share) => 14 + 200 * share;
    const [low, high] = blindTest.interval(k, n).map(at);
    const names = [[0, "0 %"], [0.5, "guessing"], [1, "100 %"]].map(([share, name]) => `<text x="${at(share)}" y="34">${name}</text>`);
    return `<svg viewBox="0 0 228 38" aria-hidden="true"><path d="M14 20H214"/><path class="chance" d="M114 2V24"/>
      <path class="interval" d="M${low} 12H${high}"/><circle cx="${at(k / n)}" cy="12" r="4.5"/>${names.join("")}</svg>`;
  },

  score(foil, answers) {
    const mine = answers.filter((answer) => answer.foil === foil);
    const said = mine.filter((answer) => answer.side);
    const k = said.filter((answer) => answer.correct).length, n = said.length;
    const range = n ? `, 95 % interval ${blindTest.interval(k, n).map(blindTest.percent).join(" to ")}` : "";
    return `<div class="score" data-foil="${foil}"><h4>${blindTest.foils[foil]}</h4>
      <p><strong>${k} right of ${n} answered</strong>${range}; “can’t tell”: ${mine.length - n}.</p>
      ${n ? blindTest.picture(k, n) : ""}<p>${blindTest.meaning(k, n)}</p></div>`;
  },

  catches(answers) {
    const caught = answers.filter((answer) => answer.foil === "catch");
    const named = caught.filter((answer) => answer.side);
    const left = named.filter((answer) => answer.side === "left").length;
    const detail = named.length
      ? `You named a side in ${named.length} (left ${left}, right ${named.length - left}), where no side was right.`
      : "Here that was the only right answer.";
    return `<div class="score" data-foil="catch"><h4>Pairs without an answer</h4>
      <p><strong>“Can’t tell”: ${caught.length - named.length} of ${caught.length}.</strong> ${detail}</p></div>`;
  },

  confidence(answers) {
    const rows = [3, 2, 1].map((sure) => {
      const at = answers.filter((answer) => answer.sure === sure);
      const scored = at.filter((answer) => answer.foil !== "catch");
      return `<tr><th scope="row">${blindTest.sureness[sure]}</th>
        <td>${scored.filter((answer) => answer.correct).length} of ${scored.length}</td><td>${at.length - scored.length}</td></tr>`;
    });
    return `<table class="table"><caption>How sure you were</caption><thead><tr><th scope="col">You said</th>
      <th scope="col">right, of pairs with an answer</th><th scope="col">pairs without one</th></tr></thead>
      <tbody>${rows.join("")}</tbody></table>`;
  },

  start(form, results, key) {
    const pairs = [...form.querySelectorAll("fieldset")];
    const [back, next] = form.querySelectorAll("button");
    const count = form.querySelector("output");
    let now = 0;

    const show = (number) => {
      now = number;
      pairs.forEach((pair, i) => (pair.hidden = pair.disabled = i !== now));
      back.disabled = now === 0;
      next.textContent = now === pairs.length - 1 ? "Show my score" : "Next pair";
      count.textContent = `${now + 1} of ${pairs.length}`;
      form.style.setProperty("--done", now / pairs.length);
    };
    const focus = () => {
      const pair = pairs[now];
      (pair.querySelector(":checked") ?? pair.querySelector("input")).focus({ preventScroll: true });
      if (form.getBoundingClientRect().top < 0) form.scrollIntoView();
    };

    const finish = () => {
      const answers = pairs.map((pair, i) => {
        const [side, sure] = pair.querySelector(":checked").value.split(" ");
        const named = side === "none" ? null : side;
        return { foil: key[i].foil, side: named, sure: Number(sure), correct: named !== null && named === key[i].answer };
      });
      results.querySelector(".scores").innerHTML =
        blindTest.score("untrained", answers) + blindTest.score("edges", answers) + blindTest.catches(answers);
      results.querySelector(".sureness").innerHTML = blindTest.confidence(answers);
      const review = results.querySelector("details");
      pairs.forEach((pair, i) => {
        pair.hidden = false;
        pair.disabled = true;
        const note = document.createElement("p");
        const said = answers[i].side ? `${answers[i].side}, ${blindTest.sureness[answers[i].sure]}` : "can’t tell";
        const scored = answers[i].side && key[i].answer;
        const verdict = scored ? ` (${answers[i].correct ? "right" : "wrong"})` : "";
        note.innerHTML = `${key[i].text} <strong>You said “${said}”${verdict}.</strong>`;
        pair.append(note);
        review.append(pair);
      });
      form.hidden = true;
      results.hidden = false;
      results.querySelector("h3").focus();
    };

    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (now === pairs.length - 1) return finish();
      show(now + 1);
      focus();
    });
    back.addEventListener("click", () => {
      show(now - 1);
      focus();
    });
    form.querySelector("nav").hidden = false;
    show(0);
  },
};
