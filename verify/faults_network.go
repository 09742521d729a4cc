//go:build unix

package verify

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"takeout/verify/proxy"
)

// networkFaults break what is between the program and its servers.
var networkFaults = []kind{
	{name: "net-cut", group: "net", on: Servers, inflict: cut},
	{name: "net-blackhole", group: "net", on: Servers, inflict: blackhole},
	{name: "net-slow", group: "net", on: Servers, inflict: slow},
	{name: "commit-lost-before", group: "net", on: Servers, inflict: commits(proxy.DropBefore)},
	{name: "commit-lost-after", group: "net", on: Servers, inflict: commits(proxy.DropAfter)},
	{name: "commit-late", group: "net", on: Servers, inflict: commits(proxy.DelayReply)},
	{name: "deadlock", group: "net", on: Servers, inflict: deadlocks},
	{name: "confirm-lost", group: "net", on: Servers, broker: true, inflict: frames(proxy.Confirm, proxy.DropAndCut)},
	{name: "confirm-nacked", group: "net", on: Servers, broker: true, inflict: frames(proxy.Confirm, proxy.Nack)},
	{name: "publish-cut", group: "net", on: Servers, broker: true, inflict: frames(proxy.Publish, proxy.Cut)},
	{name: "ack-lost", group: "net", on: Servers, broker: true, inflict: frames(proxy.Ack, proxy.DropAndCut)},
	{name: "reorder", group: "net", on: Servers, broker: true, inflict: frames(proxy.Deliver, proxy.Reorder)},
}

// either returns one of the two proxies and what is behind it.
func (s *stack) either(rnd *rand.Rand) (*proxy.Proxy, string) {
	if rnd.IntN(2) == 0 {
		return s.sqlProxy, "the database"
	}
	return s.mqProxy, "the broker"
}

func cut(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	p, name := r.stack.either(rnd)
	p.Refuse(true)
	n := p.Cut()
	d := hold(ctx, rnd, 0, 3*time.Second)
	p.Refuse(false)
	return fmt.Sprintf("%d connections to %s cut, none for %s", n, name, d), nil
}

// blackhole makes connections half open: nothing comes through, and nobody is told.
func blackhole(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	p, name := r.stack.either(rnd)
	p.Blackhole(true)
	d := hold(ctx, rnd, time.Second, 6*time.Second)
	p.Blackhole(false)
	p.Cut() // bytes are missing
	return fmt.Sprintf("nothing to and from %s for %s", name, d), nil
}

func slow(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	p, name := r.stack.either(rnd)
	delay := some(rnd, 5*time.Millisecond, 100*time.Millisecond)
	p.Slow(delay, chosen(rnd, 0, 1400, 7))
	d := hold(ctx, rnd, time.Second, 3*time.Second)
	p.Slow(0, 0)
	return fmt.Sprintf("%s to and from %s for %s", delay, name, d), nil
}

// commits does something to the next COMMITs, whoever's they are.
func commits(do proxy.Action) func(context.Context, *run, *rand.Rand) (string, error) {
	return func(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
		return r.meet(ctx, r.stack.sqlProxy, proxy.Fault{At: proxy.Commit, Do: do, Count: 1 + rnd.IntN(20), Delay: some(rnd, time.Second, 7*time.Second)})
	}
}

func deadlocks(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	return r.meet(ctx, r.stack.sqlProxy, proxy.Fault{
		At: proxy.Statement, Match: chosen(rnd, "INSERT INTO order_info", "INSERT INTO platoon", "INSERT INTO inbox", "UPDATE order_info"),
		Do: proxy.Fail, Code: chosen[uint16](rnd, 1213, 1205), Count: 1 + rnd.IntN(20),
	})
}

func frames(at proxy.Point, do proxy.Action) func(context.Context, *run, *rand.Rand) (string, error) {
	return func(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
		count := 1 + rnd.IntN(5)
		if do == proxy.Reorder || do == proxy.Nack {
			count = 1 + rnd.IntN(200)
		}
		return r.meet(ctx, r.stack.mqProxy, proxy.Fault{At: at, Do: do, Count: count, Skip: rnd.IntN(50)})
	}
}

// meet arms the fault and waits until it has met as many as it should, or enough time has passed. It returns errMissed if it met none.
func (r *run) meet(ctx context.Context, p *proxy.Proxy, f proxy.Fault) (string, error) {
	armed := p.Arm(f)
	defer armed.Disarm()
	select {
	case <-armed.Done():
	case <-ctx.Done():
	case <-time.After(5 * time.Second):
	}
	met := armed.Sprung()
	if met == 0 {
		return "", errMissed
	}
	return fmt.Sprintf("%d of %d", met, f.Count), nil
}
