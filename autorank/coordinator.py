"""The coordinator: alone it talks to the study, and decides which trial is on a lane.

It starts trials on the free lanes of an engine, whichever that is, stores what comes of them, and
at a rung lets `halving.py` say who goes on. With one lane every decision is a function of what is
stored, so a search that was killed goes on as it would have. It trains nothing and scores nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autorank.artifacts import write_json
from autorank.cost import cost_of
from autorank.display import Display
from autorank.engine import Engine, Event, Failed, Finished, Notice, Paused, Report
from autorank.halving import Runner, next_runner, stalled, verdict
from autorank.interruption import Interruption
from autorank.lane import Bench, LaneState, TrialSpec
from autorank.limits import Limits, Standing
from autorank.plan import RankPlan
from autorank.record import Score, TrialRecord, TrialSlot
from autorank.shelf import Progress, Shelf
from autorank.study import Study
from autorank.train import BatchOrder

__all__ = ["Coordinator"]

FAILURES_IN_A_ROW = 3
"""So many trials failing alike, one after the other, end the search: the next would fail too."""

SAVE_EVERY_S = 30.0
"""A lane's state is stored at least so long after the last one; at every rung too."""
SAVING_SHARE = 0.03
"""Most of the time that states stored between rungs may take."""


@dataclass
class _Training:
    """A trial on a lane."""

    slot: TrialSlot
    plan: RankPlan
    order: BatchOrder
    began: float
    saved: float
    step: int
    scores: dict[int, Score]
    seconds: float = 0.0
    saving: float = 0.0
    tokens: int = 0
    counted: int = field(default=0, repr=False)


class Coordinator:
    """Runs the trials of a study until there are enough, or a limit is reached.

    Args:
        study: the study, whose lease is held.
        bench: what the lanes train on.
        shelf: where states and adapters go.
        engine: who trains.
        display: who watches.
        limits: what ends the search.
        save_every_s: how often a lane's state is stored between rungs.
    """

    def __init__(
        self,
        study: Study,
        bench: Bench,
        shelf: Shelf,
        engine: Engine,
        display: Display,
        limits: Limits,
        *,
        save_every_s: float = SAVE_EVERY_S,
    ) -> None:
        self._study = study
        self._bench = bench
        self._shelf = shelf
        self._engine = engine
        self._display = display
        self._limits = limits
        self._save_every_s = save_every_s
        self._lanes: dict[int, _Training] = {}
        self._interrupted: set[int] = set()
        self._stopping = False
        self._why: str | None = None
        self._ended = _ended_before(study)
        self._began = time.monotonic()
        self._passes = 0.0
        self._lengths = [example.length for example in bench.train]
        self._batch = min(bench.recipe.batch_size, len(self._lengths))

    def run(self) -> None:
        """Run the trials that are missing. A signal is delivered when every lane is saved."""
        self._reconcile()
        with Interruption() as interruption:
            while self._fill():
                self._handle(self._engine.advance())
                if interruption.noted is not None:
                    self._display.note(
                        "interrupted: this step is finished and all lanes are saved; once more stops at once"
                    )
                    self._put_away()
                    return
                if self._limits.time_s is not None and self._seconds >= self._limits.time_s:
                    self._stop("time")
                    self._put_away()
                    return

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    # What runs

    def _reconcile(self) -> None:
        """Make the database say what the states say: a kill may have come between the two."""
        for slot in self._study.unfinished():
            progress = self._shelf.progress(slot.number)
            if progress is None:
                self._interrupted.add(slot.number)
                continue
            for step, score in sorted(progress.scores.items()):
                self._study.report(slot.number, step, score)
        self._tidy()

    def _fill(self) -> bool:
        """Put trials on the free lanes; whether any lane is in use."""
        while self._engine.free > 0 and (slot := self._next()) is not None:
            self._start(slot)
        return bool(self._lanes)

    def _start(self, slot: TrialSlot) -> None:
        """Put a trial on a lane, from its stored state where it has one."""
        params, now = slot.params, time.monotonic()
        plan = self._study.space.starting_plan(params)
        progress = self._shelf.progress(slot.number)
        state = self._shelf.lane(slot.number)
        steps = self._bench.recipe.steps
        training = _Training(
            slot,
            plan,
            BatchOrder(self._lengths, self._bench.recipe.batch_size, slot.seed),
            began=now,
            saved=now,
            step=0 if state is None else state.step,
            scores={} if progress is None else dict(progress.scores),
            seconds=0.0 if progress is None else float(progress.facts.get("seconds", 0.0)),
        )
        self._lanes[slot.number] = training
        if slot.number in self._interrupted:
            self._interrupted.remove(slot.number)
            self._display.note(f"trial {slot.number} was interrupted and starts over")
        self._display.trial_started(
            slot.number,
            self._limits.trials,
            params.to_json(),
            plan.parameters,
            self._study.budget,
            steps,
            step=training.step,
        )
        self._engine.start(TrialSpec.of(params, number=slot.number, seed=slot.seed, plan=plan), state)
        if self._is_stalled(training.scores):  # a kill came before it was ended
            self._engine.finish(slot.number)

    def _put_away(self) -> None:
        """Store every lane's state, the evaluation that is due included; nothing starts any more."""
        self._stopping = True
        while self._engine.pending:
            self._handle(self._engine.advance())
        for number in list(self._lanes):
            while number in self._lanes and not self._save(number):
                self._handle(self._engine.advance())

    # What comes of it

    def _handle(self, event: Event) -> None:
        if isinstance(event, Report) and event.value is None:
            self._stepped(self._lanes[event.number], event)
        elif isinstance(event, Report):
            self._evaluated(self._lanes[event.number], event)
        elif isinstance(event, Finished):
            self._finished(self._lanes.pop(event.number), event)
        elif isinstance(event, Failed):
            training = self._lanes.pop(event.number)
            training.step = event.steps
            facts = self._facts(training, training.plan) | {"samples": event.samples}
            if event.out_of_memory:
                facts["out_of_memory"] = True
            self._tell(self._study.tell_failed(event.number, event.reason, facts))
        elif isinstance(event, Paused):
            training = self._lanes.pop(event.number)
            self._shelf.save_lane(event.number, event.state, self._progress(training, event.state))
        elif isinstance(event, Notice):
            self._display.note(event.text)
            self._study.log_event("engine", text=event.text)
        else:  # lost: it goes on from its last stored state
            del self._lanes[event.number]
            if self._shelf.progress(event.number) is None:
                self._interrupted.add(event.number)

    def _stepped(self, training: _Training, event: Report) -> None:
        training.step = event.step
        self._passes += 1 / (1 + len(self._lanes.keys() - {event.number}))  # all lanes step together
        self._display.step(
            event.number, event.step, self._bench.recipe.steps, event.loss or 0.0, event.parameters
        )
        since = time.monotonic() - training.saved
        if since >= max(self._save_every_s, training.saving / SAVING_SHARE):
            self._save(event.number)

    def _evaluated(self, training: _Training, event: Report) -> None:
        """Store the state, then the score; at a rung, decide who has the lane."""
        assert event.value is not None
        training.step = event.step
        training.scores[event.step] = score = self._score(training, event.value, event.noise or 0.0)
        self._save(event.number)
        self._study.report(event.number, event.step, score)
        best = self._study.best()
        self._display.evaluated(event.number, event.step, event.value, None if best is None else best.value)
        if event.step == self._bench.recipe.steps or self._stopping:
            return
        if self._is_stalled(training.scores):
            self._engine.finish(event.number)
        else:
            self._at_rung(training)

    def _is_stalled(self, scores: Mapping[int, Score]) -> bool:
        """Whether a trial on its way has used up its patience: it ends, with the best that it had."""
        recipe = self._bench.recipe
        if recipe.patience is None or recipe.steps in scores:
            return False
        values = {step: score.value for step, score in scores.items()}
        direction = self._study.direction
        return stalled(values, direction=direction, patience=recipe.patience, settled=recipe.settled)

    def _at_rung(self, training: _Training) -> None:
        """Let the trial go on, or whichever has a better claim to its lane."""
        number = training.slot.number
        del self._lanes[number]
        slot = self._next()
        if slot is not None and slot.number == number:
            self._lanes[number] = training
            return
        self._engine.pause(number)  # its state is stored, or it is given up
        if self._study.trial(number).state == "RUNNING":
            self._display.trial_paused(number, training.step, training.scores[training.step].value)
        if slot is not None:
            self._start(slot)

    def _finished(self, training: _Training, event: Finished) -> None:
        """Store the adapter before the study hears of it."""
        checkpoint = event.checkpoint
        training.step = event.steps
        facts = self._facts(training, checkpoint.plan) | {
            "head_parameters": event.head_parameters,
            "plan": checkpoint.plan.to_json(),
            "samples": event.samples,
            "metrics": checkpoint.scores,
            "best_step": checkpoint.step,
            "ledger": event.ledger,
            "moved": event.moved,
            "artifact": self._shelf.save_adapter(
                event.number, checkpoint, dropout=training.slot.params.dropout
            ),
        }
        if event.steps < self._bench.recipe.steps:
            facts["stopped_early"] = {"step": event.steps, "of": self._bench.recipe.steps}
        self._tell(self._study.tell_complete(event.number, checkpoint.value, facts))

    def _give_up(self, number: int) -> None:
        """End a paused trial that will not go on."""
        progress = self._shelf.progress(number)
        self._tell(self._study.tell_pruned(number, {} if progress is None else progress.facts))

    def _tell(self, record: TrialRecord) -> None:
        self._ended.append(record)
        self._display.trial_ended(record.to_json())
        self._tidy()

    def _tidy(self) -> None:
        """Keep of the trials what is needed, and the ledger of cost as it stands."""
        study = self._study
        self._shelf.tidy(study.trials(), study.direction, study.budget)
        trials = [record.to_json() for record in study.trials()]
        write_json(study.folder / "cost.json", cost_of(trials, study.direction))

    def _save(self, number: int) -> bool:
        """Store a lane's state; False where an evaluation is due, for a state has that behind it."""
        began = time.monotonic()
        state, training = self._engine.snapshot(number), self._lanes[number]
        if state.step in self._bench.recipe.evaluate_at and state.step not in training.scores:
            return False
        training.step = state.step  # its report may not have been handed out yet
        self._shelf.save_lane(number, state, self._progress(training, state))
        training.saved = time.monotonic()
        training.saving = training.saved - began
        return True

    def _progress(self, training: _Training, state: LaneState) -> Progress:
        return Progress(training.scores, self._facts(training, state.plan))

    def _facts(self, training: _Training, plan: RankPlan) -> dict[str, Any]:
        """What a trial is recorded with, however it ends."""
        return {
            "trainable_parameters": plan.parameters,
            "ranks": dict(plan.ranks),
            "steps": training.step,
            "samples": training.step * self._batch,
            "tokens": self._tokens(training),
            "evaluation_samples": len(training.scores) * len(self._bench.validation),
            "seconds": training.seconds + time.monotonic() - training.began,
        }

    def _score(self, training: _Training, value: float, noise: float) -> Score:
        samples = training.step * self._batch
        others = sum(r.samples or 0 for r in self._study.trials() if r.number != training.slot.number)
        scored = (len(training.scores) + 1) * len(self._bench.validation)
        noise = noise if math.isfinite(noise) else 0.0  # of a metric that overflows on some rows
        return Score(value, noise, samples, self._tokens(training), scored, others + samples)

    def _tokens(self, training: _Training) -> int:
        """Tokens trained on so far, without padding."""
        for step in range(training.counted, training.step):
            training.tokens += sum(self._lengths[row] for row in training.order.rows(step))
        training.counted = max(training.counted, training.step)
        return training.tokens

    # Who is next

    def _next(self) -> TrialSlot | None:
        """The trial that has the next lane, a new one where none of those there are; None for none."""
        slots = {slot.number: slot for slot in self._study.unfinished()}
        records = self._study.trials()
        idle = [record for record in records if record.number in slots and record.number not in self._lanes]
        for record in idle:  # begun already, or to be run to its end whatever it scores
            done = max(record.scores, default=0) >= self._bench.recipe.steps or self._is_stalled(
                record.scores
            )
            if not record.scores or done or record.control_of is not None:
                return slots[record.number]
        total = self._limits.trials
        why = self._closing(records)
        if why is not None and records:
            return self._last(why, records, idle, slots)
        new, left = max(0, total - 1 - len(records)), self._study.left()
        if left is not None and left < new:
            new = left
            if not left:
                self._stop("exhausted")
        runners = [self._runner(record) for record in records if record.state != "FAIL"]
        lost = next((r for r in runners if r.waits and self._verdict(r, runners, new) == "lost"), None)
        if lost is not None:
            self._give_up(lost.number)
            return self._next()
        chosen = next_runner(runners, direction=self._study.direction, new=new)
        if chosen is not None:
            return slots[chosen.number]
        # The last slot depends on who won, so it is asked for when all others have ended.
        slot = self._study.ask(total) if new > 0 or not self._lanes else None
        if slot is None and new > 0:
            self._stop("exhausted")
            return self._last("exhausted", records, idle, slots)
        return slot

    def _verdict(self, runner: Runner, runners: Sequence[Runner], new: int) -> str:
        return verdict(runner, runners, direction=self._study.direction, new=new)

    def _runner(self, record: TrialRecord) -> Runner:
        scores = {step: score.value for step, score in record.scores.items()}
        noise = record.scores[max(scores)].noise if scores else 0.0
        running = record.state == "RUNNING"
        waits = running and record.number not in self._lanes and bool(scores)
        return Runner(record.number, scores, noise, waits, ended=not running)

    def _last(
        self,
        why: str,
        records: Sequence[TrialRecord],
        idle: Sequence[TrialRecord],
        slots: dict[int, TrialSlot],
    ) -> TrialSlot | None:
        """How a search ends at a limit: its leader to the end, then the control, as far as there is room."""
        if why == "failures":
            return None
        best = self._study.best()
        leader = max(idle, key=self._height, default=None)
        rivals = [record for record in records if record.number in self._lanes and record.scores]
        rivals += [] if best is None else [best]
        if leader is not None and all(self._height(leader) > self._height(rival) for rival in rivals):
            steps = self._bench.recipe.steps
            control = 0 if best is None else steps  # without a finished trial there is none
            if self._fits(steps - max(leader.scores) + control):
                return slots[leader.number]
        if self._lanes:
            return None
        if why != "time":  # the next process has as much time again
            for record in idle:
                self._give_up(record.number)
        fits = len(records) < self._limits.trials and self._fits(self._bench.recipe.steps)
        return self._study.ask_control() if fits else None

    def _height(self, record: TrialRecord) -> float:
        """A trial's best score, more being better."""
        sign = 1 if self._study.direction == "maximize" else -1
        return max(sign * score.value for score in record.scores.values())

    # Limits

    def _closing(self, records: Sequence[TrialRecord]) -> str | None:
        """What lets nothing start but what ends the search, if anything."""
        steps, rungs = self._bench.recipe.steps, self._bench.recipe.evaluate_at
        longest = max(after - before for before, after in zip((0, *rungs), rungs, strict=False))
        # The next piece of work on each lane, the leader's way to its end, and the control.
        lanes, alone = len(self._lanes), (steps - rungs[0]) + steps
        standing = self._standing(records)
        self._display.nearest(*self._limits.nearest(standing))
        why = self._limits.reached(
            standing,
            direction=self._study.direction,
            samples=((lanes + 1) * longest + alone) * self._batch,
            seconds=((min(lanes, 1) + 1) * longest + alone) * self._step_s,
        )
        if why is None and _hopeless(self._ended):
            why = "failures"
        if why is not None:
            self._stop(why)
        return why

    def _standing(self, records: Sequence[TrialRecord]) -> Standing:
        scored = [record for record in records if record.scores and record.state != "FAIL"]
        ordinary = [record for record in scored if record.control_of is None]
        best = max(scored, key=self._height, default=None)
        leader = max(ordinary, key=lambda r: (self._height(r), -r.number), default=None)
        sign = 1 if self._study.direction == "maximize" else -1
        return Standing(
            trials=sum(record.state != "RUNNING" for record in records),
            seconds=self._seconds,
            samples=sum(record.samples or 0 for record in records),
            best=None if best is None else sign * self._height(best),
            since_best=0 if leader is None else sum(record.number > leader.number for record in ordinary),
        )

    @property
    def _step_s(self) -> float:
        """Seconds of a step of all lanes, evaluations and all else included; 0 before the first."""
        return self._seconds / self._passes if self._passes else 0.0

    def _fits(self, steps: int) -> bool:
        """Whether so many steps of one trial fit the limits, after what is on the lanes already."""
        limits, records = self._limits, self._study.trials()
        spent = sum(record.samples or 0 for record in records if record.number not in self._lanes)
        rungs = self._bench.recipe.evaluate_at
        for training in self._lanes.values():  # to where the next decision is
            spent += next((rung for rung in rungs if rung > training.step), rungs[-1]) * self._batch
        enough = limits.samples is None or spent + steps * self._batch <= limits.samples
        return enough and (limits.time_s is None or self._seconds + steps * self._step_s <= limits.time_s)

    def _stop(self, why: str) -> None:
        """Log and say, once, that a limit is reached."""
        if self._why is not None:
            return
        self._why = why
        reason = self._ended[-1].reason if why == "failures" else None
        self._study.log_event("stopped", why=why, spent_s=round(self._seconds, 1), reason=reason)
        memory = why == "failures" and self._ended[-1].out_of_memory
        self._display.note(
            _STOPPED[why] + ("; lower --batch-size, --max-length or --budget" if memory else "")
        )


_STOPPED = {
    "time": "the time is up: no further trial starts",
    "samples": "what is left of the samples is kept for the winner and its control: no further trial starts",
    "target": "the target is reached: no further trial starts",
    "plateau": "no better score for as many trials as the plateau allows: no further trial starts",
    "exhausted": "everything in the space was tried: only the control follows",
    "failures": f"{FAILURES_IN_A_ROW} trials in a row failed alike: no further trial starts",
}


def _hopeless(records: Sequence[TrialRecord]) -> bool:
    """Whether the last trials all failed, and alike."""
    tail = records[-FAILURES_IN_A_ROW:]
    if len(tail) < FAILURES_IN_A_ROW or any(record.state != "FAIL" for record in tail):
        return False
    return len({record.failure for record in tail}) == 1


def _ended_before(study: Study) -> list[TrialRecord]:
    """The trials that ended before this process; none where it goes on after failures that stopped it."""
    stops = [event.get("why") for event in study.events() if event["kind"] == "stopped"]
    return [] if stops[-1:] == ["failures"] else [r for r in study.trials() if r.state != "RUNNING"]
