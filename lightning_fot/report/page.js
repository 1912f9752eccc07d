"use strict";
(function () {
  var root = document.documentElement;
  var button = document.getElementById("theme");
  var modes = ["auto", "light", "dark"];
  var mode = "auto";
  try { mode = localStorage.getItem("lightning-fot-theme") || "auto"; } catch (error) { /* storage may be off */ }
  function show() {
    if (mode === "auto") { root.removeAttribute("data-theme"); } else { root.setAttribute("data-theme", mode); }
    button.textContent = "◐ " + { auto: "Auto", light: "Light", dark: "Dark" }[mode];
    button.setAttribute("aria-label", "Colours: " + mode + ". Change");
  }
  button.hidden = false;
  button.addEventListener("click", function () {
    mode = modes[(modes.indexOf(mode) + 1) % modes.length];
    try { localStorage.setItem("lightning-fot-theme", mode); } catch (error) { /* storage may be off */ }
    show();
  });
  if (modes.indexOf(mode) < 0) { mode = "auto"; }
  show();

  var tip = document.getElementById("tip");
  function place(mark) {
    var box = mark.getBoundingClientRect();
    tip.textContent = mark.getAttribute("data-tip");
    var left = box.left + box.width / 2 - tip.offsetWidth / 2;
    left = Math.max(8, Math.min(left, root.clientWidth - tip.offsetWidth - 8));
    var top = box.top - tip.offsetHeight - 6;
    if (top < 4) { top = box.bottom + 6; }
    tip.style.left = left + window.scrollX + "px";
    tip.style.top = top + window.scrollY + "px";
    tip.classList.add("on");
  }
  function hide() { tip.classList.remove("on"); }
  document.querySelectorAll("[data-tip]").forEach(function (mark) {
    mark.addEventListener("pointerenter", function () { place(mark); });
    mark.addEventListener("focus", function () { place(mark); });
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("blur", hide);
  });

  function key(row, column) {
    var value = row.cells[column].getAttribute("data-value");
    return value === "" || value === null ? null : isNaN(value) ? value : Number(value);
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var body = table.tBodies[0];
    Array.from(table.tHead.rows[0].cells).forEach(function (head, column) {
      head.querySelector("button").addEventListener("click", function () {
        var down = head.getAttribute("aria-sort") === "ascending";
        Array.from(head.parentNode.cells).forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        var rows = Array.from(body.rows);
        rows.sort(function (a, b) {
          var x = key(a, column), y = key(b, column);
          if (x === null || y === null) { return (x === null) - (y === null); }
          var order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
          return down ? -order : order;
        });
        rows.forEach(function (row) { body.appendChild(row); });
      });
    });
  });
})();
