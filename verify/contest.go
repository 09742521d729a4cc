//go:build unix

package verify

import (
	"context"
	"net/http"
	"sync"
	"time"

	"takeout/verify/history"
)

// contest has several clients place, cancel and read one order at the same time. Whether one after the other could have
// been answered as they were is for the checker to say.
func (l *load) contest(ctx context.Context, number int, o history.Order) {
	var clients sync.WaitGroup
	for _, kinds := range l.plan.Contest(number) {
		clients.Go(func() {
			for _, kind := range kinds {
				l.do(ctx, number, o, kind)
			}
		})
	}
	clients.Wait()
}

// states are the words of answers.
var states = map[string]history.State{"placed": history.Placed, "dispatched": history.Dispatched, "cancelled": history.Cancelled}

// do asks one thing about a contested order, and notes what was answered.
func (l *load) do(ctx context.Context, number int, o history.Order, kind history.Kind) {
	method, path, body := http.MethodPost, "/v1/orders", any(requestOf(o))
	switch kind {
	case history.Cancel:
		path, body = "/v1/orders/"+o.ID+"/cancel", struct{}{}
	case history.Get:
		method, path, body = http.MethodGet, "/v1/orders/"+o.ID, nil
	}
	var now said
	op := history.Op{Kind: kind, Called: time.Since(l.began)}
	a, err := l.ask(ctx, method, l.orders, path, "", body, &now)
	op.Answered = time.Since(l.began)
	if unsent(err) {
		return
	}
	f := fate(a, err)
	absent := a.status == http.StatusNotFound && kind != history.Place
	if kind == history.Place {
		l.history.Placed(number, f, now.OrderID)
	}
	if kind == history.Cancel && !absent {
		l.history.Cancelled(number, f)
	}
	switch {
	case f == history.Unknown && kind == history.Get:
		return // changes nothing, whatever it was
	case f == history.Unknown:
		op.Answered = history.Never
	case f == history.OK:
		var known bool
		if op.Saw, known = states[now.Status]; !known || !now.fits(o) {
			l.history.Wrong(number)
		}
		op.Fresh = a.status == http.StatusCreated
	case !absent:
		l.history.Wrong(number) // nothing about it is to be refused
	}
	l.history.Did(number, op)
}
