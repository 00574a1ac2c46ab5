// Elements without HTML: every text becomes a text node, so nothing from a file is ever parsed.

/** An element; `on…` attributes are listeners, others properties where there is one; children are nodes or texts. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** An option list; `choices` are texts or [value, text]. */
export function select(label, choices, value, change) {
  const options = choices.map((choice) => (Array.isArray(choice) ? choice : [choice, choice]));
  const list = el("select", { onchange: () => change(list.value), ariaLabel: label });
  list.append(...options.map(([key, text]) => el("option", { value: key, selected: key === value }, text)));
  return el("label", { className: "field" }, el("span", {}, label), list);
}

/** A number with its sign and three digits; a dash where there is none. */
export function signed(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return (value >= 0 ? "+" : "−") + Math.abs(value).toPrecision(3);
}
