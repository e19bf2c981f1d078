package main

import (
	"errors"

	"sniproxy/hostdir"
	"sniproxy/sni"
)

// Refusals that do not come from the hello itself.
var (
	errEOF     = sni.Alert{Description: sni.DecodeError, Reason: "the client ended the connection before the server name"}
	errTimeout = sni.Alert{Description: sni.UserCanceled, Reason: "no complete server name within the time limit"}
)

// refusal turns the failure of a connection that has no backend into the alert that the
// client is told.
func refusal(err error) sni.Alert {
	var alert sni.Alert
	if errors.As(err, &alert) {
		return alert
	}
	description := sni.InternalError
	var host *hostdir.Error
	if errors.As(err, &host) {
		switch host.Problem {
		case hostdir.BacklogFull, hostdir.NoRoom, hostdir.Other:
		default:
			description = sni.UnrecognizedName
		}
	}
	return sni.Alert{Description: description, Reason: err.Error()}
}

// Errors of Dial after which it is worth trying again.
func backlogFull(err error) bool { return isProblem(err, hostdir.BacklogFull) }
func noRoom(err error) bool      { return isProblem(err, hostdir.NoRoom) }

func isProblem(err error, p hostdir.Problem) bool {
	var host *hostdir.Error
	return errors.As(err, &host) && host.Problem == p
}
